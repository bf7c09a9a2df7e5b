#pragma once

namespace mgn {

// The cosine distance is ½ ‖x/‖x‖ − y/‖y‖‖², where x/‖x‖ of a zero vector is 0.
enum class Metric { euclidean, sqeuclidean, cosine };

}  // namespace mgn
