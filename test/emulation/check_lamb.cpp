// Compares the kernels of csrc/cuda/lamb.cuh on emulated warps with the CPU's plain C++ path, bit
// for bit. Prints a line for each configuration that differs; the exit status tells whether one
// does.
#define TORCHAO8_EMULATE
#include <cstdio>
#include <memory>
#include <random>
#include <string>

#include "cpu/kernel_tables.h"
#include "cpu/vec/scalar.h"
#include "cuda/lamb.cuh"
#include "rules/lamb.h"
#include "tensors.h"

namespace {

emulation::Failures failures;
constexpr int N = LambRule::kStates;
const cuda::Tables kTables = cuda::make_tables();

// State as after many steps; some scales of the second moment are 0 or NaN.
TensorOf live_tensor(const Shape& shape, FloatType type, int block_size, int number,
                     std::mt19937& random) {
  TensorOf t = make_tensor<LambRule>(shape, type, type, block_size, random);
  for (int64_t i = 0; i < t.count(); i++) {
    for (int s = 0; s < N; s++) {
      t.code_place(s)[i] = uint8_t(random() % 256);
      const float x = std::ldexp(1 + float(random() % 1000) * 1e-3f, -int(random() % 30));
      t.states[s][size_t(i)] = s == 0 && random() % 2 ? -x : x;
    }
  }
  for (size_t b = 0; b < t.scales[0].size(); b++) {
    t.scales[0][b] = b % 3 == 0 ? -1e-3f : 2e-2f;
    t.scales[1][b] = b % 5 == 4 ? NAN : b % 5 == 3 ? 0.0f : 1e-4f;
  }
  t.step = float(number % 7);
  t.has_factors = number % 3 != 0;
  for (int k = 0; k < kFactors; k++) t.factors[k] = double(number % 5) * 0.3 + 0.1 * k;
  new_gradient(t, 1, random);
  return t;
}

cuda::Numbers<LambRule> numbers_of(const AdamOptions& options, const float& grad_scale,
                                   bool scaled) {
  cuda::Numbers<LambRule> numbers = {};
  numbers.options = options;
  numbers.options.lr = numbers.options.grad_scale = NAN;
  numbers.lr = {nullptr, 1, false};
  numbers.grad_scale = {&grad_scale, 0, false};
  numbers.found_inf = {nullptr, 0, false};
  numbers.scaled_state = scaled;
  return numbers;
}

template <class Entry, class Launch, class Fill>
void measure(std::vector<TensorOf>& tensors, const cuda::Numbers<LambRule>& numbers, int block_size,
             Launch launch, Fill fill) {
  cuda::Filler<LambRule, Entry, Launch> filler(numbers, block_size, false, launch);
  for (size_t i = 0; i < tensors.size(); i++) {
    Entry e = {};
    set_addresses<LambRule>(e, tensors[i]);
    fill(e, tensors[i]);
    e.row = uint32_t(i);
    filler.add(e);
  }
  filler.flush();
}

std::vector<int64_t> cuda_sums(std::vector<TensorOf>& tensors, const AdamOptions& options,
                               bool scaled, int block_size, unsigned blocks, bool one_scale) {
  std::vector<int64_t> sums(tensors.size() * kLimbs);
  const float grad_scale = float(options.grad_scale);
  const auto numbers = numbers_of(options, grad_scale, scaled);
  const FloatType type = tensors[0].param_type;
  if (scaled) {
    using Entry = cuda::Measured<cuda::BlockEntry<N>>;
    const auto launch = [&](const cuda::Table<LambRule, Entry>& table) {
      emulation::launch(blocks, cuda::kThreads,
                        [&] { cuda::measure_blocks<LambRule>(table, &kTables, sums.data()); });
    };
    measure<Entry>(tensors, numbers, block_size, launch, [&](Entry& e, TensorOf& t) {
      for (int s = 0; s < N; s++) {
        e.codes[s] = t.code_place(s);
        e.scales[s] = t.scales[s].data();
      }
      e.one_scale = one_scale;
      e.rows = t.shape.rows;
      e.row_length = e.row_stride = t.shape.columns;
      e.blocks_per_row = uint32_t(t.blocks_per_row(block_size));
      e.finish(type, block_size);
    });
  } else {
    using Entry = cuda::Measured<cuda::ElementEntry<N>>;
    const auto launch = [&](const cuda::Table<LambRule, Entry>& table) {
      emulation::launch(blocks, cuda::kThreads,
                        [&] { cuda::measure_elements<LambRule>(table, sums.data()); });
    };
    measure<Entry>(tensors, numbers, block_size, launch, [&](Entry& e, TensorOf& t) {
      for (int s = 0; s < N; s++) e.states[s] = t.states[s].data();
      e.count = t.count();
      e.finish(type);
    });
  }
  for (size_t i = 0; i < tensors.size(); i++) make_canonical(&sums[i * kLimbs]);
  return sums;
}

std::vector<int64_t> cpu_sums(TensorOf& t, const AdamOptions& options, bool scaled, int block_size,
                              bool one_scale) {
  AdamOptions own = options;
  if (t.has_factors) own.multiply(t.factors);
  const LambRule rule = LambRule::at_step(own, int64_t(t.step) + 1, scaled);
  const auto blocks = scalar_kernels<DynamicFormat>().measure;
  const auto elements = scalar_elements().measure;
  const auto sum = std::make_unique<SquareSum>();
  const int64_t columns = scaled ? t.shape.columns : t.count(), rows = scaled ? t.shape.rows : 1;
  const int64_t size = scaled ? block_size : 1024;
  std::vector<float> p(2048), g(2048), updates(2048);
  int64_t block = 0;
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t column = 0; column < columns; column += size, block++) {
      const int64_t begin = row * columns + column, n = std::min(size, columns - column);
      for (int64_t i = 0; i < n; i++) {
        p[size_t(i)] = cuda::load_as(t.param_type, t.place(t.param, t.param_type), begin + i);
        g[size_t(i)] = cuda::load_as(t.grad_type, t.place(t.grad, t.grad_type), begin + i);
      }
      if (scaled) {
        BlockRun run = {};
        run.param = p.data();
        run.grad = g.data();
        run.length = int(n);
        for (int s = 0; s < N; s++) {
          run.codes[s] = t.code_place(s) + begin;
          run.scales[s] = &t.scales[s][one_scale ? 0 : size_t(block)];
        }
        blocks(rule, run, updates.data());
      } else {
        ElementRun run = {};
        run.param = p.data();
        run.grad = g.data();
        run.count = n;
        for (int s = 0; s < N; s++) run.states[s] = t.states[s].data() + begin;
        elements(rule, run, updates.data());
      }
      scalar_add_squares(updates.data(), n, *sum);
    }
  }
  sum->finish();
  return {sum->limbs, sum->limbs + kLimbs};
}

void check(FloatType type, bool scaled, int block_size, unsigned blocks, bool one_scale = false) {
  std::mt19937 random(3);
  std::vector<TensorOf> tensors;
  int number = 0;
  for (const Shape& shape : kShapes)
    tensors.push_back(live_tensor(shape, type, block_size, number++, random));
  for (int i = 0; i < kTinyOnes; i++)
    tensors.push_back(live_tensor(kTiny, type, block_size, number++, random));
  AdamOptions options = {};
  options.beta1 = 0.9;
  options.beta2 = 0.99;
  options.eps = 1e-6;
  options.weight_decay = 0.1;
  options.decoupled = true;
  options.grad_scale = 4;
  const std::vector<int64_t> got =
      cuda_sums(tensors, options, scaled, block_size, blocks, one_scale);
  for (size_t i = 0; i < tensors.size(); i++) {
    const std::vector<int64_t> want = cpu_sums(tensors[i], options, scaled, block_size, one_scale);
    if (std::equal(want.begin(), want.end(), &got[i * kLimbs])) continue;
    failures++;
    std::printf("type %d, %s of %d, %u blocks: tensor %zu of %ld elements differs\n", int(type),
                scaled ? "blocks" : "32 bits", block_size, blocks, i, long(tensors[i].count()));
  }
}

}  // namespace

int main() {
  for (unsigned blocks : {1u, 3u}) {
    check(FloatType::kFloat32, true, 256, blocks);
    check(FloatType::kFloat32, false, 256, blocks);
    check(FloatType::kFloat32, true, 256, blocks, true);
  }
#ifndef QUICK
  check(FloatType::kBFloat16, true, 256, 3);
  check(FloatType::kFloat16, true, 64, 3);
  check(FloatType::kFloat32, true, 2048, 3);
  check(FloatType::kBFloat16, false, 256, 3);
#endif
  std::printf("%d configurations differ\n", failures.count);
  return failures.count != 0;
}
