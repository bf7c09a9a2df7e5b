#pragma once

namespace mgn {

// Half types are computed, and their distances and losses kept, in float32.
enum class FeatureType { float32, float64, float16, bfloat16 };

}  // namespace mgn
