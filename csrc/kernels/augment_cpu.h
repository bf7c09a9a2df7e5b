// Augmentation of uint8 images on the CPU, one pass from row to normalised row.
#pragma once
#include "cpu.h"

namespace mgn {

// All row-major, channels last; a value is one channel of a pixel.
struct Images {
  const uint8_t* pixels;  // (count, height, width, 3)
  int64_t count, height, width;
};

struct Draws {
  const bool* flip;                // (count)
  const int64_t *top, *left;       // (count), 0 … 2 · padding: of the crop in the padded image, which flip has mirrored
  const int64_t* erase;            // (count, 4): top, left, bottom, right; what lies outside the image is ignored
  int64_t padding;
};

// out: (count, height, width, 3), (value − mean) / deviation of the cropped images, of zeros where these lie in the padding; 0 in the boxes.
// mean and deviation: (width · 3), for each value in a row.
void augment(const Images& images, const Draws& draws, const float* mean, const float* deviation, float* out, int instruction_set,
             const Parallel& parallel);

}  // namespace mgn
