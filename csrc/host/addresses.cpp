// Where captions stand in an embedding store: their addresses (BLAKE2b of the UTF-8 text), and the rows of these.
#include <algorithm>
#include <string>
#include <vector>

#include "blake2b.h"
#include "host.h"
#include "threads.h"

namespace py = pybind11;

namespace llm2clip {
namespace {

// captions and addresses that are worth a thread of their own
constexpr std::size_t kLeastTexts = 1024;
constexpr std::size_t kLeastAddresses = 4096;
// addresses whose memory is fetched ahead of the comparison
constexpr std::size_t kAhead = 16;

struct Text {
  const unsigned char* data;
  std::size_t size;
};

// half surrogate pairs, which JSON may carry, become three bytes as in Python's "surrogatepass"
void append_utf8(std::string& out, Py_UCS4 c) {
  if (c < 0x80) {
    out += static_cast<char>(c);
  } else if (c < 0x800) {
    out += static_cast<char>(0xc0 | c >> 6);
    out += static_cast<char>(0x80 | (c & 0x3f));
  } else if (c < 0x10000) {
    out += static_cast<char>(0xe0 | c >> 12);
    out += static_cast<char>(0x80 | (c >> 6 & 0x3f));
    out += static_cast<char>(0x80 | (c & 0x3f));
  } else {
    out += static_cast<char>(0xf0 | c >> 18);
    out += static_cast<char>(0x80 | (c >> 12 & 0x3f));
    out += static_cast<char>(0x80 | (c >> 6 & 0x3f));
    out += static_cast<char>(0x80 | (c & 0x3f));
  }
}

std::string utf8(PyObject* text) {
  const Py_ssize_t length = PyUnicode_GET_LENGTH(text);
  const int kind = PyUnicode_KIND(text);
  const void* data = PyUnicode_DATA(text);
  std::string out;
  out.reserve(static_cast<std::size_t>(length) * 2);
  for (Py_ssize_t i = 0; i < length; ++i) append_utf8(out, PyUnicode_READ(kind, data, i));
  return out;
}

}  // namespace

Words caption_digests(const py::sequence& texts, std::size_t threads) {
  // strings of its own: another thread may change the list meanwhile
  const py::tuple held(texts);
  const std::size_t count = held.size();
  std::vector<Text> messages(count);
  std::vector<std::string> encoded;
  std::vector<std::size_t> encoded_at;
  for (std::size_t i = 0; i < count; ++i) {
    PyObject* text = PyTuple_GET_ITEM(held.ptr(), static_cast<Py_ssize_t>(i));
    if (!PyUnicode_Check(text)) {
      throw py::type_error("caption " + std::to_string(i) + " must be a string, got " + Py_TYPE(text)->tp_name);
    }
    if (PyUnicode_IS_COMPACT_ASCII(text)) {
      messages[i] = {static_cast<const unsigned char*>(PyUnicode_DATA(text)),
                     static_cast<std::size_t>(PyUnicode_GET_LENGTH(text))};
    } else {
      // not PyUnicode_AsUTF8: it would keep a second copy inside every string
      encoded.push_back(utf8(text));
      encoded_at.push_back(i);
    }
  }
  for (std::size_t k = 0; k < encoded.size(); ++k) {
    messages[encoded_at[k]] = {reinterpret_cast<const unsigned char*>(encoded[k].data()), encoded[k].size()};
  }
  Words digests({static_cast<py::ssize_t>(count), py::ssize_t{2}});
  auto* out = reinterpret_cast<unsigned char*>(digests.mutable_data());
  {
    py::gil_scoped_release release;
    in_parts(count, threads, kLeastTexts, [&](std::size_t begin, std::size_t end) {
      for (std::size_t i = begin; i < end; ++i) blake2b_128(messages[i].data, messages[i].size, out + 16 * i);
    });
  }
  return digests;
}

Int64Array find_rows(const Words& digests, const Words& high, const Words& low, const Counts& rows,
                     const Counts& buckets, std::size_t threads) {
  const std::size_t known = static_cast<std::size_t>(high.shape(0));
  const std::size_t slots = static_cast<std::size_t>(buckets.shape(0)) - 1;
  if (digests.ndim() != 2 || digests.shape(1) != 2) throw std::invalid_argument("digests must have shape (n, 2)");
  if (buckets.shape(0) < 2 || (slots & (slots - 1)) != 0 || low.shape(0) != high.shape(0) ||
      rows.shape(0) != high.shape(0) || buckets.data()[slots] != known) {
    throw std::invalid_argument("the lookup's tables do not belong together");
  }
  int shift = 64;
  for (std::size_t s = slots; s > 1; s /= 2) --shift;
  const std::uint64_t* wanted = digests.data();
  const std::uint64_t *highs = high.data(), *lows = low.data();
  const std::uint32_t *numbers = rows.data(), *starts = buckets.data();
  const std::size_t count = static_cast<std::size_t>(digests.shape(0));
  Int64Array found(static_cast<py::ssize_t>(count));
  std::int64_t* out = found.mutable_data();
  const auto slot = [shift](std::uint64_t word) { return shift == 64 ? 0 : static_cast<std::size_t>(word >> shift); };
  const auto search = [&](std::uint64_t first, std::uint64_t second) -> std::int64_t {
    const std::size_t place = slot(first);
    // a damaged table must not lead outside the arrays
    const std::size_t stop = std::min<std::size_t>(starts[place + 1], known);
    for (std::size_t i = starts[place]; i < stop && highs[i] <= first; ++i) {
      if (highs[i] == first && lows[i] == second) return numbers[i];
    }
    return -1;
  };
  {
    py::gil_scoped_release release;
    in_parts(count, threads, kLeastAddresses, [&](std::size_t begin, std::size_t end) {
      for (std::size_t i = begin; i < end; i += kAhead) {
        const std::size_t stop = std::min(end, i + kAhead);
        for (std::size_t j = i; j < stop; ++j) __builtin_prefetch(starts + slot(wanted[2 * j]));
        for (std::size_t j = i; j < stop; ++j) {
          const std::size_t near = std::min<std::size_t>(starts[slot(wanted[2 * j])], known);
          __builtin_prefetch(highs + near);
          __builtin_prefetch(lows + near);
          __builtin_prefetch(numbers + near);
        }
        for (std::size_t j = i; j < stop; ++j) out[j] = search(wanted[2 * j], wanted[2 * j + 1]);
      }
    });
  }
  return found;
}

}  // namespace llm2clip
