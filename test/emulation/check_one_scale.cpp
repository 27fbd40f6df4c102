// Compares the kernels of csrc/cuda/one_scale.cuh on emulated warps with the CPU's plain C++ path,
// bit for bit: the extreme elements, the step that uses them, and the scales. Prints a line for
// each configuration that differs; the exit status tells whether one does. With -DQUICK it checks
// one rule, which is enough to catch the mutants of test_cuda_source.py.
#define TORCHAO8_EMULATE
#include <cstdio>
#include <random>
#include <string>

#include "cpu/codec_tables.h"
#include "cpu/kernel_tables.h"
#include "cpu/vec/scalar.h"
#include "cuda/one_scale.cuh"
#include "tensors.h"

namespace {

emulation::Failures failures;
constexpr uint64_t kSeed = 11;

// type: the type of the kernel's instance.
struct Case {
  FloatType type, param_type, grad_type;
  int block_size;
  bool stochastic;
};

// ---- the CPU ------------------------------------------------------------------------------------

// The key that a step gets for an extreme element. In the mu-law format, where larger numbers get
// the last code, those of some tensors are halved.
int64_t key_for_step(const TensorOf& t, int64_t key, bool is_signed) {
  const int64_t binade = is_signed ? 1 << 24 : 1 << 23;
  const bool halved = std::is_same_v<Format, MulawFormat> && t.shape.columns == 1024;
  return halved && key > binade && key != kNoExtreme ? key - binade : key;
}

// rounds: whether bfloat16 parameters are rounded stochastically.
template <class Rule>
void cpu_step(TensorOf& t, const typename Rule::Options& options, const Case& c, bool rounds,
              std::vector<int64_t>& keys) {
  constexpr int N = Rule::kStates;
  float scalars[kMaxScalars];
  const Rule rule = next_rule<Rule>(t, options, true, scalars);
  const auto& kernels = block_kernels<Rule>(scalar_kernels<Format>());
  unsigned char *param = t.place(t.param, t.param_type), *grad = t.place(t.grad, t.grad_type);
  std::vector<float> p(size_t(t.count())), g(p);
  for (int64_t i = 0; i < t.count(); i++) {
    p[size_t(i)] = cuda::load_as(t.param_type, param, i);
    g[size_t(i)] = cuda::load_as(t.grad_type, grad, i);
  }
  ExtremeRun whole = {};
  whole.param = p.data();
  whole.grad = g.data();
  whole.count = t.count();
  float extremes[N] = {};
  for (int s = 0; s < N; s++) {
    whole.codes[s] = t.code_place(s);
    whole.scales[s] = t.scales[s][0];
  }
  kernels.extremes.float32(rule, whole, extremes);
  for (int s = 0; s < N; s++) {
    keys.push_back(Rule::kSigned[s] ? key_of_extreme<true>(extremes[s])
                                    : key_of_extreme<false>(extremes[s]));
    keys.back() = key_for_step(t, keys.back(), Rule::kSigned[s]);
    extremes[s] =
        Rule::kSigned[s] ? extreme_of_key<true>(keys.back()) : extreme_of_key<false>(keys.back());
  }
  const int64_t per_row = t.blocks_per_row(c.block_size);
  const int64_t stride = t.shape.row_stride ? t.shape.row_stride : t.shape.columns;
  const uint64_t param_key = random_key(kSeed, uint64_t(t.step) + 1, kParamStream);
  for (int64_t block = 0; block < t.shape.rows * per_row; block++) {
    const int64_t row = block / per_row, column = block % per_row * c.block_size;
    const int64_t begin = row * t.shape.columns + column;
    float scale[N];
    BlockRun run = {};
    run.tables = &codec_tables();
    run.param = p.data() + begin;
    run.grad = g.data() + begin;
    run.blocks = 1;
    run.length = int(std::min<int64_t>(c.block_size, t.shape.columns - column));
    run.stochastic = c.stochastic;
    run.first_element = uint64_t(t.shape.shard_offset + row * stride + column);
    run.extremes = extremes;
    for (int s = 0; s < N; s++) {
      scale[s] = t.scales[s][0];
      run.codes[s] = t.code_place(s) + begin;
      run.scales[s] = &scale[s];
      run.keys[s] = random_key(kSeed, uint64_t(t.step) + 1, uint64_t(s));
    }
    kernels.step.float32(rule, run);
    BlockRandom random;
    random.start(param_key, run.first_element);
    for (int i = 0; i < run.length; i++) {
      const float updated = p[size_t(begin + i)];
      if (rounds && t.param_type == FloatType::kBFloat16) {
        reinterpret_cast<BFloat16*>(param)[begin + i] = to_bfloat16(updated, random(uint32_t(i)));
      } else {
        cuda::store_as(t.param_type, param, begin + i, updated);
      }
    }
  }
  cuda::for_each_state<N>([&](auto s) {
    t.scales[s][0] = Format::template scale_of<Rule::kSigned[s], Rule::kStochastic[s]>(
        extremes[s], rule.unit[s]);
  });
}

// ---- the kernels --------------------------------------------------------------------------------

// As in the op, the kernels read the numbers from the device's memory.
struct OnDevice {
  float lr, grad_scale, found_inf;

  template <class Rule>
  cuda::Numbers<Rule> numbers(const typename Rule::Options& options) const {
    cuda::Numbers<Rule> numbers = {};
    numbers.options = options;
    numbers.options.lr = numbers.options.grad_scale = NAN;
    numbers.lr = {&lr, 0, false};
    numbers.grad_scale = {&grad_scale, 0, false};
    numbers.found_inf = {&found_inf, 0, false};
    numbers.seed = kSeed;
    numbers.scaled_state = true;
    return numbers;
  }
};

template <class Rule, class Entry, class Kernel, class Fill>
void launch(std::vector<TensorOf>& tensors, const cuda::Numbers<Rule>& numbers, const Case& c,
            unsigned blocks, Kernel kernel, Fill fill) {
  const auto run = [&](const cuda::Table<Rule, Entry>& table) {
    emulation::launch(blocks, cuda::kThreads, [&] { kernel(table); });
  };
  cuda::Filler<Rule, Entry, decltype(run)> filler(numbers, c.block_size, c.stochastic, run);
  for (size_t i = 0; i < tensors.size(); i++) {
    Entry e = {};
    set_addresses<Rule>(e, tensors[i]);
    for (int s = 0; s < Rule::kStates; s++) e.scales[s] = tensors[i].scales[s].data();
    fill(e, i);
    filler.add(e);
  }
  filler.flush();
}

template <class Rule, class T, bool kRounds>
void cuda_step(std::vector<TensorOf>& tensors, const typename Rule::Options& options, const Case& c,
               float found_inf, std::vector<int64_t>& keys) {
  constexpr int N = Rule::kStates;
  const OnDevice device = {float(options.lr), float(options.grad_scale), found_inf};
  const auto numbers = device.numbers<Rule>(options);
  keys.assign(tensors.size() * N, 0);
  using Finds = cuda::ExtremesEntryOf<Rule>;
  launch<Rule, Finds>(
      tensors, numbers, c, 3,
      [&](const cuda::Table<Rule, Finds>& table) {
        cuda::find_extremes<Rule, T, Format>(table, &kTables);
      },
      [&](Finds& e, size_t i) {
        for (int s = 0; s < N; s++) e.codes[s] = tensors[i].code_place(s);
        e.keys = &keys[i * N];
        e.count = tensors[i].count();
        e.finish(c.type);
      });
  for (size_t i = 0; i < tensors.size(); i++) {
    for (int s = 0; s < N; s++)
      keys[i * N + size_t(s)] = key_for_step(tensors[i], keys[i * N + size_t(s)], Rule::kSigned[s]);
  }
  using Steps = cuda::OneScaleEntryOf<Rule>;
  launch<Rule, Steps>(
      tensors, numbers, c, 3,
      [&](const cuda::Table<Rule, Steps>& table) {
        cuda::step_one_scale<Rule, T, kRounds, Format>(table, &kTables);
      },
      [&](Steps& e, size_t i) {
        TensorOf& t = tensors[i];
        for (int s = 0; s < N; s++) e.codes[s] = t.code_place(s);
        e.rows = t.shape.rows;
        e.row_length = t.shape.columns;
        e.row_stride = t.shape.row_stride ? t.shape.row_stride : t.shape.columns;
        e.shard_offset = uint64_t(t.shape.shard_offset);
        e.blocks_per_row = uint32_t(t.blocks_per_row(c.block_size));
        e.extremes = &keys[i * N];
        e.finish(c.type, c.block_size);
      });
  using Scales = cuda::ScalesEntryOf<Rule>;
  launch<Rule, Scales>(
      tensors, numbers, c, unsigned(tensors.size() / cuda::kThreads + 1),
      [](const cuda::Table<Rule, Scales>& table) { cuda::write_scales<Rule, Format>(table); },
      [&](Scales& e, size_t i) { e.extremes = &keys[i * N]; });
}

// ---- the comparison -----------------------------------------------------------------------------

template <class V>
int64_t differences(const V& a, const V& b) {
  int64_t n = a.size() != b.size();
  for (size_t i = 0; i < std::min(a.size(), b.size()); i++)
    n += std::memcmp(&a[i], &b[i], sizeof a[i]) != 0;
  return n;
}

template <class Rule, class T, bool kRounds = false>
void check(const char* name, const typename Rule::Options& base, const Case& c) {
  std::mt19937 random(5);
  std::vector<TensorOf> gpu;
  const auto add = [&](const Shape& shape) {
    TensorOf t = make_tensor<Rule>(shape, c.param_type, c.grad_type, c.block_size, random);
    for (int s = 0; s < Rule::kStates; s++) t.scales[s].assign(1, 0.0f);
    t.step = float(gpu.size() % 7);
    t.has_factors = gpu.size() % 3 != 0;
    for (int k = 0; k < kFactors; k++) t.factors[k] = double(gpu.size() % 5) * 0.3 + 0.1 * k;
    if (gpu.size() == 11 || gpu.size() == 20) t.factors[0] = NAN;  // they stay as they are
    gpu.push_back(t);
  };
  for (const Shape& shape : kShapes) add(shape);
  for (int i = 0; i < kTinyOnes; i++) add(kTiny);
  const size_t without_many = gpu.size();
  if (kRounds && Rule::kStates == 2 && c.block_size == cuda::kSpan && c.stochastic)
    add(many(c.block_size));
  std::vector<TensorOf> cpu = gpu;
  for (int step = 1; step <= 4; step++) {
    typename Rule::Options options = base;
    options.lr = step == 3 ? 0.0 : double(1e-2f);
    if (step == 4) gpu[1].scales[0][0] = cpu[1].scales[0][0] = NAN;
    for (size_t i = 0; i < gpu.size(); i++) {
      new_gradient(gpu[i], step, random);
      std::memcpy(cpu[i].place(cpu[i].grad, c.grad_type), gpu[i].place(gpu[i].grad, c.grad_type),
                  size_t(gpu[i].count()) * cuda::bytes_of(c.grad_type));
    }
    const float found_inf = step == 2 ? 1.0f : 0.0f;
    std::vector<int64_t> keys, want;
    cuda_step<Rule, T, kRounds>(gpu, options, c, found_inf, keys);
    if (found_inf == 0) {
      for (TensorOf& t : cpu) cpu_step<Rule>(t, options, c, kRounds, want);
    }
    int64_t n = found_inf == 0 ? differences(keys, want) : 0, of_tensors = 0;
    for (size_t i = 0; i < gpu.size(); i++) {
      of_tensors += differences(gpu[i].param, cpu[i].param);
      for (int s = 0; s < Rule::kStates; s++) {
        of_tensors += differences(gpu[i].codes[s], cpu[i].codes[s]) +
                      differences(gpu[i].scales[s], cpu[i].scales[s]);
      }
      gpu[i].step++;
      cpu[i].step++;
    }
    gpu.resize(without_many);  // its random numbers have been seen
    cpu.resize(without_many);
    if (n + of_tensors == 0) continue;
    failures++;
    std::printf(
        "%s, types %d and %d, blocks of %d, %s%s, step %d: %ld extremes, %ld others differ\n", name,
        int(c.param_type), int(c.grad_type), c.block_size, c.stochastic ? "stochastic" : "nearest",
        kRounds ? ", parameters too" : "", step, long(n), long(of_tensors));
  }
}

}  // namespace

int main() {
  const FloatType f32 = FloatType::kFloat32, bf16 = FloatType::kBFloat16, f16 = FloatType::kFloat16;
  AdamOptions adam = {};
  adam.beta1 = 0.9;
  adam.beta2 = 0.999;
  adam.eps = 1e-8;
  adam.weight_decay = 0.1;
  adam.grad_scale = 1;
  adam.decoupled = true;
  using Adamw = AdamRule<false, true>;
  check<Adamw, float>("AdamW", adam, {f32, f32, f32, 256, true});
  check<Adamw, float>("AdamW", adam, {f32, f32, f32, 64, false});
  check<Adamw, BFloat16, true>("AdamW", adam, {bf16, bf16, bf16, 256, true});
#ifndef QUICK
  check<Adamw, BFloat16>("AdamW", adam, {bf16, bf16, bf16, 256, false});
  check<Adamw, Half>("AdamW", adam, {f16, f16, f16, 256, true});
  check<Adamw, BFloat16>("AdamW", adam, {bf16, bf16, f32, 1024, true});
  check<Adamw, BFloat16, true>("AdamW", adam, {bf16, bf16, bf16, 256, false});
  check<Adamw, BFloat16, true>("AdamW", adam, {bf16, bf16, bf16, 64, true});
  check<Adamw, BFloat16, true>("AdamW", adam, {bf16, bf16, bf16, 1024, true});
  check<Adamw, BFloat16, true>("AdamW", adam, {bf16, bf16, f32, 256, true});
  check<Adamw, BFloat16, true>("AdamW", adam, {bf16, f32, f32, 256, true});
  adam.decoupled = false;
  adam.grad_scale = 4;
  adam.eps = 0;
  check<AdamRule<true, false>, float>("Adam, amsgrad", adam, {f32, f32, f32, 256, true});
  AdemamixOptions ademamix = {};
  ademamix.beta1 = 0.9;
  ademamix.beta2 = 0.999;
  ademamix.beta3 = 0.9999;
  ademamix.alpha = 5;
  ademamix.t_alpha = ademamix.t_beta3 = 5;
  ademamix.eps = 1e-8;
  ademamix.grad_scale = 4;
  check<AdemamixRule, float>("AdEMAMix", ademamix, {f32, f32, f32, 256, true});
  LionOptions lion = {};
  lion.beta1 = 0.9;
  lion.beta2 = 0.99;
  lion.weight_decay = 0.1;
  lion.grad_scale = 4;
  lion.maximize = true;
  check<LionRule, BFloat16>("Lion", lion, {bf16, bf16, bf16, 256, false});
  check<LionRule, BFloat16, true>("Lion", lion, {bf16, bf16, bf16, 256, true});
  SgdOptions sgd = {};
  sgd.momentum = 0.9;
  sgd.weight_decay = 0.1;
  sgd.grad_scale = 4;
  sgd.rate_in_buffer = true;
  check<SgdRule<true, true>, float>("LARS", sgd, {f32, f32, f32, 256, false});
#endif
  std::printf("%d configurations differ\n", failures.count);
  return failures.count != 0;
}
