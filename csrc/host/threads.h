#pragma once

#include <algorithm>
#include <cstddef>
#include <thread>
#include <vector>

namespace llm2clip {

// body(begin, end) over [0, count) in up to `threads` parts of at least `least` each; the caller takes the first.
template <class Body>
void in_parts(std::size_t count, std::size_t threads, std::size_t least, const Body& body) {
  const std::size_t parts = std::max<std::size_t>(1, std::min(threads, count / std::max<std::size_t>(least, 1)));
  std::vector<std::thread> others;
  others.reserve(parts - 1);
  for (std::size_t part = 1; part < parts; ++part) {
    others.emplace_back([&body, count, parts, part] { body(count * part / parts, count * (part + 1) / parts); });
  }
  body(0, count / parts);
  for (std::thread& other : others) other.join();
}

}  // namespace llm2clip
