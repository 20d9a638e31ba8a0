/* AMX on a CPU without it: preloaded into a process, it carries out each AMX instruction that the CPU does not know.

Such an instruction raises SIGILL. The handler decodes it, does to memory and to tiles of the thread what the manual says
(Intel SDM volume 2: LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TILERELEASE, TDPBF16PS, TDPBUSD), and goes on behind it.
What the CPU would refuse ends the process with a message: sizes beyond the palette, tiles without a configuration, matrices that
do not fit, an operand twice. arch_prctl grants or, where AMX_EMULATOR_REFUSES is set, refuses the tiles. The number of
multiplications goes to stderr as the process ends. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

typedef struct { uint8_t row[16][64]; int rows, bytes; } Tile;
typedef struct { Tile tile[8]; int configured; } State;

static __thread State state;
static atomic_int granted;
static atomic_long multiplications;

static void refuse(const char* why) {
  dprintf(2, "AMX emulator: %s\n", why);
  _exit(86);
}

static void require(int condition, const char* why) {
  if (!condition) refuse(why);
}

static Tile* tile_of(int number) {
  require(state.configured, "no tiles are configured");
  require(number < 8, "there are eight tiles");
  Tile* tile = &state.tile[number];
  require(tile->rows && tile->bytes, "the tile has no size");
  return tile;
}

static void configure(const uint8_t* from) {
  memset(&state, 0, sizeof state);
  if (!from[0]) return;
  require(from[0] == 1, "the palette is not 1");
  for (int i = 2; i < 16; i++) require(!from[i], "a reserved byte of the configuration is set");
  for (int i = 0; i < 8; i++) {
    uint16_t bytes;
    memcpy(&bytes, from + 16 + 2 * i, 2);
    require(bytes <= 64 && from[48 + i] <= 16, "a tile is larger than 16 rows of 64 bytes");
    require(!bytes == !from[48 + i], "a tile has rows or bytes, and not both");
    state.tile[i].rows = from[48 + i], state.tile[i].bytes = bytes;
  }
  for (int i = 32; i < 48; i++) require(!from[i], "a tile beyond the eighth has bytes");
  for (int i = 56; i < 64; i++) require(!from[i], "a tile beyond the eighth has rows");
  state.configured = 1;
}

static void load(Tile* tile, const uint8_t* at, int64_t stride) {
  memset(tile->row, 0, sizeof tile->row);
  for (int i = 0; i < tile->rows; i++) memcpy(tile->row[i], at + i * stride, tile->bytes);
}

static void store(const Tile* tile, uint8_t* at, int64_t stride) {
  for (int i = 0; i < tile->rows; i++) memcpy(at + i * stride, tile->row[i], tile->bytes);
}

static float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0, x) : x; }

static float widened(const uint8_t* row, int number) {
  uint16_t half;
  memcpy(&half, row + 2 * number, 2);
  uint32_t bits = (uint32_t)half << 16;
  float x;
  memcpy(&x, &bits, 4);
  return flushed(x);
}

static void begin_product(const Tile* total, const Tile* left, const Tile* right) {
  require(total != left && total != right && left != right, "an operand stands twice");
  require(total->rows == left->rows && total->bytes == right->bytes && left->bytes == 4 * right->rows,
          "the sizes of the tiles do not fit");
  multiplications++;
}

/* TDPBUSD: unsigned bytes of the left tile times signed ones of the right; sums wrap around. */
static void multiply_codes(Tile* total, const Tile* left, const Tile* right) {
  begin_product(total, left, right);
  for (int m = 0; m < total->rows; m++) {
    uint32_t sums[16];
    memcpy(sums, total->row[m], total->bytes);
    for (int k = 0; k < left->bytes; k++)
      for (int n = 0; n < total->bytes / 4; n++)
        sums[n] += (uint32_t)(left->row[m][k] * (int8_t)right->row[k / 4][4 * n + k % 4]);
    memcpy(total->row[m], sums, total->bytes);
  }
}

static void multiply(Tile* total, const Tile* left, const Tile* right) {
  begin_product(total, left, right);
  int columns = total->bytes / 4, depth = left->bytes / 4;
  float a[32], b[16][32];
  for (int k = 0; k < depth; k++)
    for (int n = 0; n < 2 * columns; n++) b[k][n] = widened(right->row[k], n);
  for (int m = 0; m < total->rows; m++) {
    float sums[32] = {0}, old[16];
    for (int k = 0; k < 2 * depth; k++) a[k] = widened(left->row[m], k);
    for (int k = 0; k < depth; k++)
      for (int n = 0; n < 2 * columns; n++) sums[n] = __builtin_fmaf(a[2 * k + n % 2], b[k][n], sums[n]);
    memcpy(old, total->row[m], 4 * columns);
    for (int n = 0; n < columns; n++) old[n] = flushed(old[n] + flushed(sums[2 * n] + sums[2 * n + 1]));
    memcpy(total->row[m], old, 4 * columns);
  }
}

static int64_t value_of(const greg_t* registers, int number) {
  static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return registers[order[number]];
}

/* The address that ModRM, SIB and displacement give; moves `at` behind them. `stride` is the index register. */
static uint8_t* address_of(const uint8_t** at, const greg_t* registers, int x, int b, int64_t* stride) {
  int mode = **at >> 6, low = *(*at)++ & 7;
  int64_t address = 0;
  *stride = 0;
  int relative = 0, wide = mode == 2;
  if (low == 4) {
    int sib = *(*at)++, base = sib & 7, index = (sib >> 3 & 7) | x << 3;
    if (index != 4) *stride = value_of(registers, index) << (sib >> 6);
    if (base == 5 && mode == 0) wide = 1;
    else address = value_of(registers, base | b << 3);
  } else if (low == 5 && mode == 0) {
    wide = relative = 1;
  } else {
    address = value_of(registers, low | b << 3);
  }
  if (mode == 1) {
    address += (int8_t) * *at;
    *at += 1;
  } else if (wide) {
    int32_t displacement;
    memcpy(&displacement, *at, 4);
    address += displacement;
    *at += 4;
  }
  if (relative) address += (int64_t)*at;
  return (uint8_t*)address;
}

/* VEX prefixes 66, F3 and F2 in the field pp. */
enum { NONE, OPERAND, REPEAT, REPEAT_NOT };

static void handle(int signal_, siginfo_t* info, void* context) {
  greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  const uint8_t* at = (const uint8_t*)registers[REG_RIP];
  int known = at[0] == 0xc4 && (at[1] & 31) == 2 && !(at[2] & 0x84);
  if (!known || (at[3] != 0x49 && at[3] != 0x4b && at[3] != 0x5c && at[3] != 0x5e)) {
    signal(SIGILL, SIG_DFL);
    return;
  }
  require(granted, "tiles were used before arch_prctl granted them");
  int r = !(at[1] & 0x80), x = !(at[1] & 0x40), b = !(at[1] & 0x20);
  int third = ~at[2] >> 3 & 15, prefix = at[2] & 3, opcode = at[3];
  at += 4;
  int direct = *at >> 6 == 3, first = (*at >> 3 & 7) | r << 3, second = (*at & 7) | b << 3;
  int64_t stride;
  if (opcode == 0x5c && direct && prefix == REPEAT) {
    at++;
    multiply(tile_of(first), tile_of(second), tile_of(third));
  } else if (opcode == 0x5e && direct && prefix == OPERAND) {
    at++;
    multiply_codes(tile_of(first), tile_of(second), tile_of(third));
  } else if (opcode == 0x4b && !direct && (*at & 7) == 4 && prefix != NONE) {
    uint8_t* place = address_of(&at, registers, x, b, &stride);
    if (prefix == REPEAT) store(tile_of(first), place, stride);
    else load(tile_of(first), place, stride);
  } else if (opcode == 0x49 && direct && prefix == REPEAT_NOT) {
    at++;
    memset(tile_of(first)->row, 0, sizeof state.tile[0].row);
  } else if (opcode == 0x49 && direct && prefix == NONE) {
    at++;
    memset(&state, 0, sizeof state);
  } else if (opcode == 0x49 && !direct && prefix == NONE) {
    configure(address_of(&at, registers, x, b, &stride));
  } else {
    refuse("an AMX instruction that is not emulated");
  }
  registers[REG_RIP] = (greg_t)at;
}

/* What the C library has under this name, but for the request for tiles: ARCH_REQ_XCOMP_PERM of XTILEDATA. */
long syscall(long number, ...) {
  va_list rest;
  long a[6];
  va_start(rest, number);
  for (int i = 0; i < 6; i++) a[i] = va_arg(rest, long);
  va_end(rest);
  if (number == 158 && a[0] == 0x1023 && a[1] == 18) {
    granted = !getenv("AMX_EMULATOR_REFUSES");
    if (!granted) errno = EPERM;
    return granted ? 0 : -1;
  }
  static long (*original)(long, ...);
  if (!original) original = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
  return original(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

__attribute__((constructor)) static void begin(void) {
  struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_NODEFER};
  sigaction(SIGILL, &action, NULL);
}

__attribute__((destructor)) static void end(void) {
  if (multiplications) dprintf(2, "AMX emulator: %ld multiplications\n", (long)multiplications);
}
