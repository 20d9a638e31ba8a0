// The members of an artifact, a zip or a folder, mapped into memory; no field of the file is trusted.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <memory>

#include "json.hpp"

namespace graphopt {

using Bytes = std::string_view;

class Archive {
 public:
  explicit Archive(std::string path) : path_(std::move(path)) {
    struct stat status;
    if (stat(path_.c_str(), &status)) throw Error("cannot open " + path_ + ": " + std::strerror(errno));
    folder_ = S_ISDIR(status.st_mode);
    if (!folder_) read_zip(map(path_));
  }

  // The bytes of a member, valid as long as the archive.
  Bytes member(const std::string& name) {
    auto found = members_.find(name);
    if (found == members_.end() && folder_ && plain(name))
      found = members_.emplace(name, map(path_ + "/" + name)).first;
    if (found == members_.end()) throw Error(path_ + " has no member " + name + "; it is incomplete, get it again");
    return found->second;
  }

  const std::string& path() const { return path_; }

 private:
  static constexpr uint64_t kWide = 0xFFFFFFFF;

  [[noreturn]] void damaged(const char* how) const {
    throw Error(path_ + " is no artifact, or truncated or altered: " + how + "; get it again");
  }

  // Relative paths of plain characters, so that no name leaves the folder.
  static bool plain(const std::string& name) {
    return !name.empty() && name[0] != '/' && name.find("..") == std::string::npos;
  }

  Bytes map(const std::string& path) {
    int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) throw Error("cannot open " + path + ": " + std::strerror(errno));
    struct stat status;
    void* start = fstat(file, &status) || !status.st_size
                      ? MAP_FAILED
                      : mmap(nullptr, status.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (start == MAP_FAILED) throw Error(path + " is empty or cannot be mapped; get it again");
    size_t size = status.st_size;
    mapped_.emplace_back(start, [size](void* begin) { munmap(begin, size); });
    return {static_cast<const char*>(start), size};
  }

  template <typename T>
  T at(Bytes data, uint64_t offset) const {
    T value;
    if (offset > data.size() || data.size() - offset < sizeof value) damaged("its directory cannot be read");
    std::memcpy(&value, data.data() + offset, sizeof value);  // zip is little-endian, and so are the machines
    return value;
  }

  void read_zip(Bytes data) {
    uint64_t end = data.size() - 22;
    if (data.size() < 22 || at<uint32_t>(data, end) != 0x06054b50) damaged("the end of the archive is missing");
    uint64_t count = at<uint16_t>(data, end + 10), size = at<uint32_t>(data, end + 12);
    uint64_t start = at<uint32_t>(data, end + 16);
    if (count == 0xFFFF || size == kWide || start == kWide) {
      uint64_t record = at<uint64_t>(data, end - 20 + 8);
      if (at<uint32_t>(data, record) != 0x06064b50) damaged("its directory is not where the file says");
      count = at<uint64_t>(data, record + 32);
      size = at<uint64_t>(data, record + 40);
      start = at<uint64_t>(data, record + 48);
    }
    if (start > data.size() || size > data.size() - start) damaged("its directory is not where the file says");
    for (uint64_t position = start; count--;) position = read_entry(data, position);
  }

  uint64_t read_entry(Bytes data, uint64_t position) {
    if (at<uint32_t>(data, position) != 0x02014b50) damaged("its directory is damaged");
    if (at<uint16_t>(data, position + 8) & 1 || at<uint16_t>(data, position + 10)) damaged("a member is compressed");
    uint64_t size = at<uint32_t>(data, position + 24), offset = at<uint32_t>(data, position + 42);
    uint64_t name_size = at<uint16_t>(data, position + 28), extra_size = at<uint16_t>(data, position + 30);
    uint64_t extra = position + 46 + name_size, next = extra + extra_size + at<uint16_t>(data, position + 32);
    if (next > data.size()) damaged("its directory is damaged");
    std::string name(data.substr(position + 46, name_size));
    for (uint64_t field = extra; field + 4 <= extra + extra_size; field += 4 + at<uint16_t>(data, field + 2)) {
      if (at<uint16_t>(data, field) != 1) continue;  // zip64: the wide values in order, sizes first
      uint64_t wide = field + 4;
      if (size == kWide) size = at<uint64_t>(data, wide), wide += 16;
      if (offset == kWide) offset = at<uint64_t>(data, wide);
    }
    if (at<uint32_t>(data, offset) != 0x04034b50) damaged("a member is not where the directory says");
    uint64_t begin = offset + 30 + at<uint16_t>(data, offset + 26) + at<uint16_t>(data, offset + 28);
    if (begin > data.size() || size > data.size() - begin) damaged("a member is outside the file");
    if (!members_.emplace(name, data.substr(begin, size)).second) damaged("it has two members of one name");
    if (name == "manifest.json" && crc32(members_[name]) != at<uint32_t>(data, position + 16))
      damaged("manifest.json has another checksum than the archive's directory says");
    return next;
  }

  static uint32_t crc32(Bytes data) {
    uint32_t crc = ~0u;
    for (char byte : data) {
      crc ^= static_cast<uint8_t>(byte);
      for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
    }
    return ~crc;
  }

  std::string path_;
  bool folder_;
  std::map<std::string, Bytes> members_;
  std::vector<std::shared_ptr<void>> mapped_;
};

}  // namespace graphopt
