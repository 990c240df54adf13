// Index of a tar file from its 512-byte headers: ustar, GNU long names and pax. Content is never read.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <vector>

#include <pybind11/stl.h>

#include "host.h"

namespace py = pybind11;

namespace llm2clip {
namespace {

constexpr std::int64_t kBlock = 512;
constexpr std::int64_t kMaxHeaderBody = 1 << 20;

class File {
 public:
  explicit File(const std::string& path) : descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    struct stat info {};
    if (descriptor_ < 0 || ::fstat(descriptor_, &info) != 0) error_ = errno;
    size_ = info.st_size;
  }
  ~File() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int error() const { return error_; }
  std::int64_t size() const { return size_; }

  std::string read(std::int64_t position, std::int64_t count) {
    std::string data(static_cast<std::size_t>(count), '\0');
    std::int64_t done = 0;
    while (done < count) {
      const ssize_t got = ::pread(descriptor_, &data[static_cast<std::size_t>(done)],
                                  static_cast<std::size_t>(count - done), position + done);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) error_ = errno;
      if (got <= 0) break;
      done += got;
    }
    data.resize(static_cast<std::size_t>(done));
    return data;
  }

 private:
  int descriptor_;
  int error_ = 0;
  std::int64_t size_ = 0;
};

std::string until_nul(const std::string& data) { return data.substr(0, data.find('\0')); }

std::int64_t padded(std::int64_t size) { return (size + kBlock - 1) / kBlock * kBlock; }

// octal text, or base 256 when the first bit is set; -1 when it is neither
std::int64_t number(const std::string& field) {
  if (static_cast<unsigned char>(field[0]) & 0x80) {
    std::uint64_t value = static_cast<unsigned char>(field[0]) & 0x7f;
    for (std::size_t i = 1; i < field.size(); ++i) {
      if (value >> 54) return -1;
      value = value << 8 | static_cast<unsigned char>(field[i]);
    }
    return static_cast<std::int64_t>(value);
  }
  std::string digits = until_nul(field);
  digits.erase(0, digits.find_first_not_of(' ') == std::string::npos ? digits.size() : digits.find_first_not_of(' '));
  digits.erase(digits.find_last_not_of(' ') + 1);
  std::int64_t value = 0;
  for (const char digit : digits) {
    if (digit < '0' || digit > '7') return -1;
    value = value * 8 + (digit - '0');
  }
  return value;
}

bool checksum_ok(const std::string& header) {
  std::int64_t sum = 8 * ' ';
  for (std::size_t i = 0; i < header.size(); ++i) {
    if (i < 148 || i >= 156) sum += static_cast<unsigned char>(header[i]);
  }
  return sum == number(header.substr(148, 8));
}

std::string short_name(const std::string& header) {
  const std::string name = until_nul(header.substr(0, 100));
  if (header.compare(257, 6, std::string("ustar\0", 6)) == 0) {
    const std::string prefix = until_nul(header.substr(345, 155));
    if (!prefix.empty()) return prefix + "/" + name;
  }
  return name;
}

bool all_digits(const std::string& text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

// -1 for what is no number or past what a file can hold
std::int64_t decimal(const std::string& text) {
  // 19 digits are at most 1e19 - 1 and fit an unsigned 64-bit number
  if (!all_digits(text) || text.size() > 19) return -1;
  std::uint64_t value = 0;
  for (const char digit : text) value = value * 10 + static_cast<std::uint64_t>(digit - '0');
  return value < (std::uint64_t{1} << 58) ? static_cast<std::int64_t>(value) : -1;
}

std::map<std::string, std::string> pax_records(const std::string& data) {
  std::map<std::string, std::string> records;
  std::size_t position = 0;
  while (position < data.size()) {
    const std::size_t space = data.find(' ', position);
    if (space == std::string::npos || space == position || space >= position + 12) break;
    const std::int64_t length = decimal(data.substr(position, space - position));
    const std::size_t end = position + static_cast<std::size_t>(std::max<std::int64_t>(length, 0));
    if (length <= static_cast<std::int64_t>(space - position + 1) || end > data.size()) break;
    const std::string body = data.substr(space + 1, end - 1 - (space + 1));
    const std::size_t separator = body.find('=');
    if (separator != std::string::npos) records[body.substr(0, separator)] = body.substr(separator + 1);
    position = end;
  }
  return records;
}

const char* kind_name(char kind) {
  switch (kind) {
    case '1': return "a hard link";
    case '2': return "a symbolic link";
    case '3':
    case '4': return "a device";
    case '6': return "a pipe";
    default: return "not a regular file";
  }
}

struct Scan {
  std::vector<std::string> names;
  std::vector<std::int64_t> offsets;
  std::vector<std::int64_t> sizes;
  std::vector<std::pair<std::string, std::string>> refused;
  std::string damage;
  std::string damaged_member;
};

void scan(File& file, Scan& out) {
  const std::int64_t end = file.size();
  std::int64_t position = 0;
  std::string long_name;
  bool has_long_name = false;
  std::map<std::string, std::string> pax;
  const auto damaged = [&](const char* what) { out.damage = what + std::string(" at byte ") + std::to_string(position); };
  while (true) {
    const std::string header = file.read(position, kBlock);
    if (static_cast<std::int64_t>(header.size()) < kBlock) {
      if (!header.empty() || position > end || has_long_name || !pax.empty()) damaged("cut inside a header");
      return;
    }
    if (header.find_first_not_of('\0') == std::string::npos) return;
    if (!checksum_ok(header)) return damaged("damaged header");
    std::int64_t size = number(header.substr(124, 12));
    const char kind = header[156];
    const std::int64_t content = position + kBlock;
    if (kind == 'L' || kind == 'K' || kind == 'x' || kind == 'g') {
      if (size < 0 || size > kMaxHeaderBody) return damaged("damaged header");
      const std::string data = file.read(content, size);
      if (static_cast<std::int64_t>(data.size()) < size) return damaged("cut inside a header");
      if (kind == 'L') {
        long_name = until_nul(data);
        has_long_name = true;
      } else if (kind == 'x') {
        pax = pax_records(data);
      }
      position = content + padded(size);
      continue;
    }
    if (const auto entry = pax.find("size"); entry != pax.end()) size = decimal(entry->second);
    std::string name;
    if (const auto entry = pax.find("path"); entry != pax.end()) name = entry->second;
    if (name.empty()) name = long_name;
    if (name.empty()) name = short_name(header);
    long_name.clear();
    has_long_name = false;
    pax.clear();
    if (size < 0) return damaged("damaged header");
    if (kind == '0' || kind == '\0' || kind == '7') {
      const bool old_directory = kind == '\0' && !name.empty() && name.back() == '/';
      if (!old_directory) {
        if (size > end - content) {
          out.damaged_member = name;
          out.damage = "cut";
          return;
        }
        out.names.push_back(name);
        out.offsets.push_back(content);
        out.sizes.push_back(size);
      }
    } else if (kind != '5') {
      out.refused.emplace_back(name, kind_name(kind));
    }
    // links, devices, directories and pipes have no content, whatever their size field says
    position = content + (kind >= '1' && kind <= '6' ? 0 : padded(size));
  }
}

}  // namespace

py::tuple index_tar(const std::string& path) {
  Scan result;
  int error = 0;
  std::int64_t end = 0;
  {
    py::gil_scoped_release release;
    File file(path);
    if (file.error() == 0) scan(file, result);
    error = file.error();
    end = file.size();
  }
  if (error != 0) {
    errno = error;
    PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
    throw py::error_already_set();
  }
  py::list names;
  for (const std::string& name : result.names) names.append(py::bytes(name));
  py::list refused;
  for (const auto& [name, reason] : result.refused) refused.append(py::make_tuple(py::bytes(name), reason));
  py::object damage = py::str(result.damage);
  if (result.damage == "cut") {
    const py::object member = py::bytes(result.damaged_member).attr("decode")("utf-8", "surrogateescape");
    damage = py::str("cut inside member {!r} at byte {}").format(member, end);
  }
  return py::make_tuple(names, py::cast(result.offsets), py::cast(result.sizes), refused, damage);
}

}  // namespace llm2clip
