#pragma once

namespace mgn {

enum class Metric { euclidean, sqeuclidean, cosine };  // the cosine as ½ ‖x/‖x‖ − y/‖y‖‖², and 0 for x/‖x‖ of a zero vector

}  // namespace mgn
