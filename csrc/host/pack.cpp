// First-fit decreasing with a tree of free room, O(n log n) instead of a scan over all open bins.
#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "host.h"

namespace llm2clip {
namespace {

// room[node] = largest free room below node; leaves are bins in the order in which they are opened
class RoomTree {
 public:
  RoomTree(std::size_t bins, std::int64_t budget) {
    while (leaves_ < bins) leaves_ *= 2;
    room_.assign(2 * leaves_, budget);
  }

  // the first bin with room for `length`, whose room then shrinks by it
  std::size_t take(std::int64_t length) {
    std::size_t node = 1;
    while (node < leaves_) node = room_[2 * node] >= length ? 2 * node : 2 * node + 1;
    const std::size_t bin = node - leaves_;
    room_[node] -= length;
    for (node /= 2; node >= 1; node /= 2) room_[node] = std::max(room_[2 * node], room_[2 * node + 1]);
    return bin;
  }

 private:
  std::size_t leaves_ = 1;
  std::vector<std::int64_t> room_;
};

}  // namespace

Int64Array pack(const Int64Array& lengths, std::int64_t budget) {
  if (lengths.ndim() != 1) throw std::invalid_argument("lengths must have one dimension");
  if (budget < 1) throw std::invalid_argument("the token budget must be at least 1");
  const auto view = lengths.unchecked<1>();
  const std::size_t count = static_cast<std::size_t>(view.shape(0));
  std::vector<std::int64_t> size(count);
  for (std::size_t i = 0; i < count; ++i) {
    if (view(i) < 0) throw std::invalid_argument("a length is negative");
    // a sequence over the budget fills a bin of its own
    size[i] = std::min<std::int64_t>(view(i), budget);
  }
  std::vector<std::size_t> order(count);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return size[a] > size[b]; });
  Int64Array bins(static_cast<pybind11::ssize_t>(count));
  auto out = bins.mutable_unchecked<1>();
  RoomTree tree(count, budget);
  for (const std::size_t i : order) out(i) = static_cast<std::int64_t>(tree.take(size[i]));
  return bins;
}

}  // namespace llm2clip
