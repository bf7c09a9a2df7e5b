#include "augment_cpu.h"

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mgn {
namespace {

constexpr int64_t kGrain = 1 << 16;      // values worth a thread
constexpr int64_t kLargePage = 1 << 21;  // bytes

using NormaliseRow = void (*)(const uint8_t* values, const float* mean, const float* deviation, int64_t n, float* out);

}  // namespace
}  // namespace mgn

#define LOOPS "augment_loops.h"
#include "each_instruction_set.h"

namespace mgn {
namespace {

constexpr NormaliseRow kNormaliseRow[] = {OF_EACH_INSTRUCTION_SET(normalise_row)};

// A new batch is memory that the system has yet to give, page by page as it is written to: with large ones that takes a fraction
// of the time, which otherwise exceeds all the arithmetic. Where there are none nothing happens.
void ask_for_large_pages(void* begin, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t first = (uintptr_t(begin) + kLargePage - 1) / kLargePage * kLargePage, last = (uintptr_t(begin) + bytes) / kLargePage * kLargePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// (width, 3) in reverse order of pixels; out has room for a byte more. From the last pixel on each takes the byte behind it along,
// which the next overwrites: four bytes are one load and one store.
void mirror(const uint8_t* row, int64_t width, uint8_t* out) {
  std::memcpy(out, row + 3 * (width - 1), 3);
  for (int64_t x = width - 2; x >= 0; --x) std::memcpy(out + 3 * (width - 1 - x), row + 3 * x, 4);
}

int64_t within(int64_t place, int64_t size) { return std::clamp<int64_t>(place, 0, size); }

}  // namespace

void augment(const Images& images, const Draws& draws, const float* mean, const float* deviation, float* out, int instruction_set,
             const Parallel& parallel) {
  const int64_t height = images.height, width = images.width, values = 3 * width;
  const NormaliseRow normalise = kNormaliseRow[compiled_instruction_set(instruction_set)];
  const std::vector<uint8_t> zeros(values);
  std::vector<float> black(values);
  normalise(zeros.data(), mean, deviation, values, black.data());
  ask_for_large_pages(out, images.count * height * values * int64_t(sizeof(float)));
  parallel(images.count * height, std::max<int64_t>(1, kGrain / std::max<int64_t>(values, 1)), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> mirrored(values + 1);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t image = r / height, y = r % height;
      // The place of out's (y, 0) in the image, and the values first … last − 1 of the row for which there are pixels.
      const int64_t down = y + draws.top[image] - draws.padding, right = draws.left[image] - draws.padding;
      const bool shown = 0 <= down && down < height;
      const int64_t first = shown ? 3 * within(-right, width) : values, last = std::max(first, 3 * within(width - right, width));
      float* to = out + r * values;
      std::copy_n(black.data(), first, to);
      if (first < last) {
        const uint8_t* row = images.pixels + (image * height + down) * values;
        if (draws.flip[image]) {
          mirror(row, width, mirrored.data());
          row = mirrored.data();
        }
        normalise(row + first + 3 * right, mean + first, deviation + first, last - first, to + first);
      }
      std::copy(black.data() + last, black.data() + values, to + last);
      const int64_t* box = draws.erase + 4 * image;
      if (box[0] <= y && y < box[2] && box[1] < box[3])
        std::fill(to + 3 * within(box[1], width), to + 3 * within(box[3], width), 0.0f);
    }
  });
}

}  // namespace mgn
