// What this machine's CPU can do, in the kernel's words ("avx512f", "asimddp"), and which CPUs may be used.
#pragma once

#include <sched.h>
#include <sys/auxv.h>
#include <sys/utsname.h>

#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <vector>

namespace graphopt {

#ifdef __aarch64__
// The kernel's own list, bit by bit: AT_HWCAP, then AT_HWCAP2 (Linux, arch/arm64/include/uapi/asm/hwcap.h).
inline void add_flags(std::set<std::string>& found) {
  static const char* const kFirst[] = {"fp",     "asimd",  "evtstrm", "aes",      "pmull",   "sha1",   "sha2",
                                       "crc32",  "atomics", "fphp",   "asimdhp",  "cpuid",   "asimdrdm", "jscvt",
                                       "fcma",   "lrcpc",  "dcpop",   "sha3",     "sm3",     "sm4",    "asimddp",
                                       "sha512", "sve"};
  unsigned bit = 0;
  for (const char* name : kFirst)
    if (getauxval(AT_HWCAP) >> bit++ & 1) found.insert(name);
  if (getauxval(AT_HWCAP2) >> 13 & 1) found.insert("i8mm");
  if (getauxval(AT_HWCAP2) >> 14 & 1) found.insert("bf16");
}
#else
inline void add_flags(std::set<std::string>& found) {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, 5, "flags")) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    for (std::string word; words >> word;) found.insert(word);
    break;
  }
}
#endif

// CPU flags, and the kind of machine ("x86_64", "aarch64").
inline const std::set<std::string>& host_features() {
  static const std::set<std::string> found = [] {
    std::set<std::string> all;
    add_flags(all);
    utsname system;
    if (!uname(&system)) all.insert(system.machine);
    return all;
  }();
  return found;
}

// Numbers of the CPUs that the calling thread may use.
inline std::vector<int> allowed_cpus() {
  cpu_set_t set;
  std::vector<int> found;
  if (sched_getaffinity(0, sizeof set, &set)) return {0};
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &set)) found.push_back(cpu);
  return found;
}

}  // namespace graphopt
