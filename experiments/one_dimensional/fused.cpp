// The papers' small energy networks, value and gradient, a tile of points at a time in the first-level cache.
//
// A hidden layer of ten units is so cheap that reading and writing its tensors takes most of a step: torch goes through
// memory some sixty times, this once in each direction. The backward pass computes the hidden layers again.

#include <torch/extension.h>

#include <cmath>
#include <vector>

namespace {

constexpr int64_t W = 10;     // width
constexpr int64_t T = 64;     // points in a tile
constexpr int64_t LANES = 16; // partial sums of a weight's gradient
constexpr int64_t MAX_LAYERS = 8;

using Tile = float[W][T];

// Where the weights of a seed lie in its row of parameters.
struct Layout {
  int64_t y_layers, residual_layers;
  int64_t first() const { return 0; }                                       // weight (W), bias (W)
  int64_t y(int64_t i) const { return 2 * W + (i - 1) * (W * W + W); }      // weight (W, W), bias (W), i >= 1
  int64_t joint() const { return 2 * W + (y_layers - 1) * (W * W + W); }    // weight (W, W)
  int64_t residual(int64_t i) const { return joint() + W * W + i * (W * W + W); }
  int64_t output() const { return residual(residual_layers); }              // weight (W), bias
  int64_t size() const { return output() + W + 1; }
};

template <bool TANH> inline void activate(Tile h) {
  float* p = &h[0][0];
#pragma GCC ivdep
  for (int64_t i = 0; i < W * T; ++i) p[i] = TANH ? tanhf(p[i]) : (p[i] > 0.f ? p[i] : 0.f);
}

// d *= derivative of the activation, from its value
template <bool TANH> inline void slope(const Tile a, Tile d) {
  const float* pa = &a[0][0];
  float* pd = &d[0][0];
#pragma GCC ivdep
  for (int64_t i = 0; i < W * T; ++i) pd[i] *= TANH ? 1.f - pa[i] * pa[i] : (pa[i] > 0.f ? 1.f : 0.f);
}

inline void linear(const float* weight, const float* bias, const Tile in, Tile out) {
  for (int64_t j = 0; j < W; ++j) {
    float sum[T];
    for (int64_t t = 0; t < T; ++t) sum[t] = bias[j];
    for (int64_t k = 0; k < W; ++k) {
      const float w = weight[j * W + k];
      for (int64_t t = 0; t < T; ++t) sum[t] += w * in[k][t];
    }
    for (int64_t t = 0; t < T; ++t) out[j][t] = sum[t];
  }
}

// out (+)= weight^T d
template <bool ADD> inline void transposed(const float* weight, const Tile d, Tile out) {
  for (int64_t k = 0; k < W; ++k) {
    float sum[T];
    for (int64_t t = 0; t < T; ++t) sum[t] = ADD ? out[k][t] : 0.f;
    for (int64_t j = 0; j < W; ++j) {
      const float w = weight[j * W + k];
      for (int64_t t = 0; t < T; ++t) sum[t] += w * d[j][t];
    }
    for (int64_t t = 0; t < T; ++t) out[k][t] = sum[t];
  }
}

inline void add_product(const float* a, const float* b, float* lanes) {
  float sum[LANES];
  for (int64_t l = 0; l < LANES; ++l) sum[l] = lanes[l];
  for (int64_t t = 0; t < T; t += LANES)
    for (int64_t l = 0; l < LANES; ++l) sum[l] += a[t + l] * b[t + l];
  for (int64_t l = 0; l < LANES; ++l) lanes[l] = sum[l];
}

inline void add_sum(const float* a, float* lanes) {
  for (int64_t t = 0; t < T; t += LANES)
    for (int64_t l = 0; l < LANES; ++l) lanes[l] += a[t + l];
}

inline void weight_gradient(const Tile d, const Tile in, float* weight, float* bias) {
  for (int64_t j = 0; j < W; ++j) {
    for (int64_t k = 0; k < W; ++k) add_product(d[j], in[k], weight + (j * W + k) * LANES);
    if (bias) add_sum(d[j], bias + j * LANES);
  }
}

struct Hidden {
  Tile y[MAX_LAYERS];      // outputs of the y-branch
  Tile joint;              // output of the joint layer
  Tile change[MAX_LAYERS]; // what each residual layer adds
  Tile sum[MAX_LAYERS];    // its input plus that
};

template <bool TANH>
void forward_tile(const Layout& at, const float* p, const float* x, int64_t rows, const float* points, Hidden& h,
                  float* value) {
  const float *w = p + at.first(), *b = w + W;
  for (int64_t j = 0; j < W; ++j)
    for (int64_t t = 0; t < T; ++t) h.y[0][j][t] = w[j] * points[t] + b[j];
  activate<TANH>(h.y[0]);
  for (int64_t i = 1; i < at.y_layers; ++i) {
    linear(p + at.y(i), p + at.y(i) + W * W, h.y[i - 1], h.y[i]);
    activate<TANH>(h.y[i]);
  }
  float from_x[W];
  for (int64_t j = 0; j < W; ++j) from_x[j] = x[j * rows];
  linear(p + at.joint(), from_x, h.y[at.y_layers - 1], h.joint);
  activate<TANH>(h.joint);
  const Tile* last = &h.joint;
  for (int64_t i = 0; i < at.residual_layers; ++i) {
    const float* layer = p + at.residual(i);
    linear(layer, layer + W * W, *last, h.change[i]);
    activate<TANH>(h.change[i]);
    for (int64_t j = 0; j < W; ++j)
      for (int64_t t = 0; t < T; ++t) h.sum[i][j][t] = h.change[i][j][t] + (*last)[j][t];
    last = &h.sum[i];
  }
  const float* out = p + at.output();
  float sum[T];
  for (int64_t t = 0; t < T; ++t) sum[t] = out[W];
  for (int64_t k = 0; k < W; ++k)
    for (int64_t t = 0; t < T; ++t) sum[t] += out[k] * (*last)[k][t];
  for (int64_t t = 0; t < T; ++t) value[t] = sum[t];
}

// The gradient of a tile: to lanes of partial sums for the parameters (may be null), to the points, to x.
template <bool TANH>
void backward_tile(const Layout& at, const float* p, const float* points, const Hidden& h, const float* d_value,
                   float* lanes, float* d_points, float* d_x) {
  const int64_t r = at.residual_layers;
  const Tile& top = r ? h.sum[r - 1] : h.joint;
  const float* out = p + at.output();
  Tile d, e;
  for (int64_t k = 0; k < W; ++k)
    for (int64_t t = 0; t < T; ++t) d[k][t] = out[k] * d_value[t];
  if (lanes) {
    for (int64_t k = 0; k < W; ++k) add_product(d_value, top[k], lanes + (at.output() + k) * LANES);
    add_sum(d_value, lanes + (at.output() + W) * LANES);
  }
  for (int64_t i = r - 1; i >= 0; --i) {
    const Tile& in = i ? h.sum[i - 1] : h.joint;
    for (int64_t k = 0; k < W; ++k)
      for (int64_t t = 0; t < T; ++t) e[k][t] = d[k][t];
    slope<TANH>(h.change[i], e);
    float* g = lanes ? lanes + at.residual(i) * LANES : nullptr;
    if (g) weight_gradient(e, in, g, g + W * W * LANES);
    transposed<true>(p + at.residual(i), e, d);
  }
  slope<TANH>(h.joint, d);
  if (lanes) {
    weight_gradient(d, h.y[at.y_layers - 1], lanes + at.joint() * LANES, nullptr);
    for (int64_t j = 0; j < W; ++j) add_sum(d[j], d_x + j * LANES);
  }
  transposed<false>(p + at.joint(), d, e);
  for (int64_t i = at.y_layers - 1; i >= 1; --i) {
    slope<TANH>(h.y[i], e);
    float* g = lanes ? lanes + at.y(i) * LANES : nullptr;
    if (g) weight_gradient(e, h.y[i - 1], g, g + W * W * LANES);
    transposed<false>(p + at.y(i), e, d);
    for (int64_t k = 0; k < W; ++k)
      for (int64_t t = 0; t < T; ++t) e[k][t] = d[k][t];
  }
  slope<TANH>(h.y[0], e);
  if (lanes) {
    float* g = lanes + at.first() * LANES;
    for (int64_t j = 0; j < W; ++j) {
      add_product(e[j], points, g + j * LANES);
      add_sum(e[j], g + (W + j) * LANES);
    }
  }
  if (d_points) {
    const float* w = p + at.first();
    float sum[T];
    for (int64_t t = 0; t < T; ++t) sum[t] = 0.f;
    for (int64_t j = 0; j < W; ++j)
      for (int64_t t = 0; t < T; ++t) sum[t] += w[j] * e[j][t];
    for (int64_t t = 0; t < T; ++t) d_points[t] = sum[t];
  }
}

void check(const Layout& at, const torch::Tensor& parameters, const torch::Tensor& from_x, const torch::Tensor& points) {
  for (const auto* tensor : {&parameters, &from_x, &points})
    TORCH_CHECK(tensor->is_contiguous() && tensor->scalar_type() == torch::kFloat && tensor->device().is_cpu(),
                "expected contiguous float tensors on the CPU");
  const int64_t s = points.size(0);
  TORCH_CHECK(points.dim() == 3 && from_x.sizes() == torch::IntArrayRef({s, W, points.size(1)}), "bad shape of from_x");
  TORCH_CHECK(parameters.sizes() == torch::IntArrayRef({s, at.size()}), "bad shape of parameters");
  TORCH_CHECK(1 <= at.y_layers && at.y_layers <= MAX_LAYERS && at.residual_layers <= MAX_LAYERS, "too many layers");
}

template <bool TANH>
torch::Tensor forward(const Layout& at, torch::Tensor parameters, torch::Tensor from_x, torch::Tensor points) {
  const int64_t seeds = points.size(0), rows = points.size(1), count = points.size(2);
  auto values = torch::empty_like(points);
  at::parallel_for(0, seeds * rows, 1, [&](int64_t begin, int64_t end) {
    Hidden h;
    float in[T], out[T];
    for (int64_t row = begin; row < end; ++row) {
      const int64_t s = row / rows, b = row % rows;
      const float* p = parameters.const_data_ptr<float>() + s * at.size();
      const float* x = from_x.const_data_ptr<float>() + s * W * rows + b;
      for (int64_t start = 0; start < count; start += T) {
        const int64_t n = std::min(T, count - start);
        const float* from = points.const_data_ptr<float>() + row * count + start;
        for (int64_t t = 0; t < T; ++t) in[t] = t < n ? from[t] : 0.f;
        forward_tile<TANH>(at, p, x, rows, in, h, out);
        std::copy(out, out + n, values.mutable_data_ptr<float>() + row * count + start);
      }
    }
  });
  return values;
}

template <bool TANH>
std::vector<torch::Tensor> backward(const Layout& at, torch::Tensor parameters, torch::Tensor from_x,
                                    torch::Tensor points, torch::Tensor d_values, bool of_points,
                                    bool of_parameters) {
  const int64_t seeds = points.size(0), rows = points.size(1), count = points.size(2);
  auto d_parameters = of_parameters ? torch::empty_like(parameters) : torch::empty({0});
  auto d_from_x = of_parameters ? torch::empty_like(from_x) : torch::empty({0});
  auto d_points = of_points ? torch::empty_like(points) : torch::empty({0});
  at::parallel_for(0, seeds, 1, [&](int64_t begin, int64_t end) {
    Hidden h;
    float in[T], out[T], d_out[T], d_in[T];
    std::vector<float> lanes(of_parameters ? at.size() * LANES : 0), x_lanes(W * LANES);
    for (int64_t s = begin; s < end; ++s) {
      const float* p = parameters.const_data_ptr<float>() + s * at.size();
      std::fill(lanes.begin(), lanes.end(), 0.f);
      for (int64_t b = 0; b < rows; ++b) {
        const float* x = from_x.const_data_ptr<float>() + s * W * rows + b;
        std::fill(x_lanes.begin(), x_lanes.end(), 0.f);
        for (int64_t start = 0; start < count; start += T) {
          const int64_t n = std::min(T, count - start), offset = (s * rows + b) * count + start;
          const float* from = points.const_data_ptr<float>() + offset;
          const float* d_from = d_values.const_data_ptr<float>() + offset;
          for (int64_t t = 0; t < T; ++t) in[t] = t < n ? from[t] : 0.f;
          for (int64_t t = 0; t < T; ++t) d_out[t] = t < n ? d_from[t] : 0.f;
          forward_tile<TANH>(at, p, x, rows, in, h, out);
          backward_tile<TANH>(at, p, in, h, d_out, of_parameters ? lanes.data() : nullptr, of_points ? d_in : nullptr,
                              x_lanes.data());
          if (of_points) std::copy(d_in, d_in + n, d_points.mutable_data_ptr<float>() + offset);
        }
        if (of_parameters)
          for (int64_t j = 0; j < W; ++j) {
            float sum = 0.f;
            for (int64_t l = 0; l < LANES; ++l) sum += x_lanes[j * LANES + l];
            d_from_x.mutable_data_ptr<float>()[(s * W + j) * rows + b] = sum;
          }
      }
      if (of_parameters)
        for (int64_t i = 0; i < at.size(); ++i) {
          float sum = 0.f;
          for (int64_t l = 0; l < LANES; ++l) sum += lanes[i * LANES + l];
          d_parameters.mutable_data_ptr<float>()[s * at.size() + i] = sum;
        }
    }
  });
  return {d_parameters, d_from_x, d_points};
}

torch::Tensor energy(torch::Tensor parameters, torch::Tensor from_x, torch::Tensor points, int64_t y_layers,
                     int64_t residual_layers, bool tanh) {
  const Layout at{y_layers, residual_layers};
  check(at, parameters, from_x, points);
  return tanh ? forward<true>(at, parameters, from_x, points) : forward<false>(at, parameters, from_x, points);
}

std::vector<torch::Tensor> gradient(torch::Tensor parameters, torch::Tensor from_x, torch::Tensor points,
                                    torch::Tensor d_values, int64_t y_layers, int64_t residual_layers, bool tanh,
                                    bool of_points, bool of_parameters) {
  const Layout at{y_layers, residual_layers};
  check(at, parameters, from_x, points);
  TORCH_CHECK(d_values.is_contiguous() && d_values.sizes() == points.sizes() && d_values.scalar_type() == torch::kFloat,
              "bad gradient of the values");
  return tanh ? backward<true>(at, parameters, from_x, points, d_values, of_points, of_parameters)
              : backward<false>(at, parameters, from_x, points, d_values, of_points, of_parameters);
}

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("energy", &energy);
  m.def("gradient", &gradient);
}
