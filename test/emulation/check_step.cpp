// Compares the kernels of csrc/cuda on emulated warps with the CPU's plain C++ path, bit for bit.
// Prints a line for each configuration that differs; the exit status tells whether one does.
// With -DQUICK it checks one rule and two types, enough for the mutants of cuda_mutants.py. Of
// these, -DBRIEF compiles and checks one step kernel only, which detects most of them. With
// -DONLY_MUON it checks Muon's rules.
#define TORCHAO8_EMULATE
#include <cstdio>
#include <functional>
#include <numeric>
#include <random>
#include <string>

#include "cpu/codec_tables.h"
#include "cpu/formats/dynamic/scalar.h"
#include "cpu/kernel_tables.h"
#include "cuda/count.cuh"
#include "cuda/quantize.cuh"
#include "cuda/step.cuh"
#include "tensors.h"

using namespace torchao8;

namespace {

constexpr FormatInfo kFormat = make_format_info<Format>();
emulation::Failures failures;

// rounds: whether bfloat16 parameters are rounded stochastically.
template <class Rule>
void cpu_step(TensorOf& t, const typename Rule::Options& options, bool scaled, int block_size,
              bool stochastic, bool rounds, uint64_t seed) {
  const int64_t step = int64_t(t.step) + 1;
  float scalars[kMaxScalars];
  const Rule rule = next_rule<Rule>(t, options, scaled, scalars);
  std::copy(scalars, scalars + kMaxScalars, t.scalars);
  const auto& blocks = block_kernels<Rule>(scalar_kernels<Format>());
  const auto& elements = element_kernels<Rule>(scalar_elements());
  unsigned char *param = t.place(t.param, t.param_type), *grad = t.place(t.grad, t.grad_type);
  std::vector<float> p(4096), g(4096);
  const uint64_t param_key = random_key(seed, uint64_t(step), kParamStream);
  const auto with_floats = [&](int64_t begin, int n, auto f, auto hash) {
    for (int i = 0; i < n; i++) {
      p[size_t(i)] = cuda::load_as(t.param_type, param, begin + i);
      g[size_t(i)] = cuda::load_as(t.grad_type, grad, begin + i);
    }
    f();
    for (int i = 0; i < n; i++) {
      if (rounds && t.param_type == FloatType::kBFloat16) {
        reinterpret_cast<BFloat16*>(param)[begin + i] = to_bfloat16(p[size_t(i)], hash(i));
      } else {
        cuda::store_as(t.param_type, param, begin + i, p[size_t(i)]);
      }
    }
  };
  const int64_t stride = t.shape.row_stride ? t.shape.row_stride : t.shape.columns;
  if (!scaled) {
    for (int64_t begin = 0; begin < t.count(); begin += 4096) {
      const int n = int(std::min<int64_t>(4096, t.count() - begin));
      ElementRun run = {};
      run.param = p.data();
      run.grad = g.data();
      run.count = n;
      for (int s = 0; s < Rule::kStates; s++) run.states[s] = t.states[s].data() + begin;
      const auto hash = [&](int i) {
        const int64_t row = (begin + i) / t.shape.columns, column = (begin + i) % t.shape.columns;
        return ElementRandom(param_key)(uint64_t(t.shape.shard_offset + row * stride + column));
      };
      with_floats(begin, n, [&] { elements.step.float32(rule, run); }, hash);
    }
    t.step++;
    return;
  }
  const int64_t per_row = t.blocks_per_row(block_size);
  for (int64_t block = 0; block < t.shape.rows * per_row; block++) {
    const int64_t row = block / per_row, column = block % per_row * block_size;
    const int64_t begin = row * t.shape.columns + column;
    BlockRun run = {};
    run.tables = &codec_tables();
    run.param = p.data();
    run.grad = g.data();
    run.blocks = 1;
    run.length = int(std::min<int64_t>(block_size, t.shape.columns - column));
    run.stochastic = stochastic;
    run.first_element = uint64_t(t.shape.shard_offset + row * stride + column);
    for (int s = 0; s < Rule::kStates; s++) {
      run.codes[s] = t.code_place(s, row, column);
      run.scales[s] = t.scales[s].data() + block;
      run.keys[s] = random_key(seed, uint64_t(step), uint64_t(s));
    }
    BlockRandom random;
    random.start(param_key, run.first_element);
    with_floats(
        begin, run.length, [&] { blocks.step.float32(rule, run); },
        [&](int i) { return random(uint32_t(i)); });
    for (int s = 0; s < Rule::kStates; s++)
      kFormat.clear_after(run.length, run.codes[s], kFormat.zero_byte[Rule::kSigned[s]]);
  }
  t.step++;
}

template <class Rule>
struct StepNumbers {
  typename Rule::Options options;
  uint64_t seed;
  float lr, grad_scale, found_inf;
  double rest[kNumberCount<typename Rule::Options>];
  bool rest_on_device;
};

// As in the op, the kernels read the numbers from the device's memory.
template <class Rule>
cuda::Numbers<Rule> numbers_of(const StepNumbers<Rule>& from, bool scaled) {
  cuda::Numbers<Rule> numbers = {};
  numbers.options = from.options;
  numbers.options.lr = numbers.options.grad_scale = NAN;
  numbers.lr = {&from.lr, 0, false};
  numbers.grad_scale = {&from.grad_scale, 0, false};
  numbers.found_inf = {&from.found_inf, 0, false};
  numbers.seed = from.seed;
  numbers.scaled_state = scaled;
  if (from.rest_on_device) {
    double unknown[kNumberCount<typename Rule::Options>];
    std::fill(std::begin(unknown), std::end(unknown), double(NAN));
    set_numbers(numbers.options, unknown);
    numbers.rest = from.rest;
  }
  return numbers;
}

template <class Rule, class T, bool kRounds>
void cuda_block_step(std::vector<TensorOf>& tensors, FloatType type,
                     const StepNumbers<Rule>& numbers, int block_size, bool stochastic) {
  using Entry = cuda::BlockEntryOf<Rule>;
  const auto launch = [&](const cuda::Table<Rule, Entry>& table) {
    emulation::launch(3, cuda::kThreads, [&] {
      if (block_size == cuda::kSpan) {
        cuda::step_blocks<Rule, T, cuda::Blocks::kSpan, kRounds, Format>(table, &kTables);
      }
#ifndef BRIEF
      if (block_size > cuda::kSpan) {
        cuda::step_blocks<Rule, T, cuda::Blocks::kLong, kRounds, Format>(table, &kTables);
      } else if (block_size < cuda::kSpan) {
        cuda::step_blocks<Rule, T, cuda::Blocks::kShort, kRounds, Format>(table, &kTables);
      }
#endif
    });
  };
  cuda::Filler<Rule, Entry, decltype(launch)> filler(numbers_of<Rule>(numbers, true), block_size,
                                                     stochastic, launch);
  for (TensorOf& t : tensors) {
    Entry e = {};
    set_addresses<Rule>(e, t);
    for (int s = 0; s < Rule::kStates; s++) {
      e.codes[s] = t.code_place(s);
      e.scales[s] = t.scales[s].data();
    }
    e.rows = t.shape.rows;
    e.row_length = t.shape.columns;
    e.row_stride = t.shape.row_stride ? t.shape.row_stride : t.shape.columns;
    e.shard_offset = uint64_t(t.shape.shard_offset);
    e.blocks_per_row = uint32_t(t.blocks_per_row(block_size));
    e.finish(type, block_size);
    filler.add(e);
  }
  filler.flush();
}

template <class Rule, class T, bool kRounds>
void cuda_element_step(std::vector<TensorOf>& tensors, FloatType type,
                       const StepNumbers<Rule>& numbers) {
  using Entry = cuda::ElementEntryOf<Rule, kRounds>;
  const auto launch = [&](const cuda::Table<Rule, Entry>& table) {
    emulation::launch(3, cuda::kThreads, [&] { cuda::step_elements<Rule, T, kRounds>(table); });
  };
  cuda::Filler<Rule, Entry, decltype(launch)> filler(numbers_of<Rule>(numbers, false), 256, false,
                                                     launch);
  for (TensorOf& t : tensors) {
    Entry e = {};
    set_addresses<Rule>(e, t);
    for (int s = 0; s < Rule::kStates; s++) e.states[s] = t.states[s].data();
    e.count = t.count();
    if constexpr (kRounds) {
      e.shard_offset = uint64_t(t.shape.shard_offset);
      e.row_length = t.shape.row_stride ? t.shape.columns : e.count;
      e.row_stride = t.shape.row_stride;
    }
    e.finish(type);
    filler.add(e);
  }
  filler.flush();
}

template <class Rule>
void cuda_write_scalars(std::vector<TensorOf>& tensors, const StepNumbers<Rule>& numbers,
                        bool scaled) {
  using Entry = cuda::ScalarsEntryOf<Rule>;
  const auto launch = [&](const cuda::Table<Rule, Entry>& table) {
    emulation::launch((table.count + cuda::kThreads - 1) / cuda::kThreads, cuda::kThreads,
                      [&] { cuda::write_scalars<Rule>(table); });
  };
  cuda::Filler<Rule, Entry, decltype(launch)> filler(numbers_of<Rule>(numbers, scaled), 256, false,
                                                     launch);
  for (TensorOf& t : tensors) {
    Entry e = {};
    set_addresses<Rule>(e, t);
    filler.add(e);
  }
  filler.flush();
}

void cuda_count(size_t count, const std::function<float*(size_t)>& step_of,
                const float& found_inf) {
  cuda::for_each_step_table(count, step_of, [&](unsigned blocks, const cuda::StepTable& table) {
    emulation::launch(blocks, cuda::kThreads,
                      [&] { cuda::count_step(table, {&found_inf, 0, false}); });
  });
}

// More step counts than two launches take, and those around the end of one.
void check_counts() {
  for (const int more : {-1, 0, 1, cuda::StepTable::kCapacity + 5}) {
    std::vector<float> steps(size_t(cuda::StepTable::kCapacity + more));
    std::iota(steps.begin(), steps.end(), 0.0f);
    for (const float found_inf : {0.0f, 1.0f})
      cuda_count(steps.size(), [&](size_t i) { return &steps[i]; }, found_inf);
    for (size_t i = 0; i < steps.size(); i++) {
      if (steps[i] == float(i + 1)) continue;
      failures++;
      std::printf("step count %zu of %zu: %g\n", i, steps.size(), double(steps[i]));
      break;
    }
  }
}

template <class V>
int64_t differences(const V& a, const V& b) {
  int64_t n = 0;
  for (size_t i = 0; i < a.size(); i++) n += std::memcmp(&a[i], &b[i], sizeof a[i]) != 0;
  return n;
}

void compare(const std::string& what, std::vector<TensorOf>& gpu, std::vector<TensorOf>& cpu) {
  for (size_t i = 0; i < gpu.size(); i++) {
    TensorOf &a = gpu[i], &b = cpu[i];
    int64_t n = differences(a.param, b.param) + (a.step != b.step), in_state = 0;
    for (int s = 0; s < kMaxScalars; s++) in_state += a.scalars[s] != b.scalars[s];
    for (int s = 0; s < kMaxStates; s++) {
      in_state += differences(a.codes[s], b.codes[s]) + differences(a.scales[s], b.scales[s]) +
                  differences(a.states[s], b.states[s]);
    }
    if (n + in_state == 0) continue;
    failures++;
    std::printf("%s, tensor %zu (%ld, %ld): %ld bytes of parameters, %ld of the state differ\n",
                what.c_str(), i, long(a.shape.rows), long(a.shape.columns), long(n),
                long(in_state));
  }
}

template <class Rule, class T, bool kRounds = false>
void check(const char* rule_name, FloatType type, FloatType param_type, FloatType grad_type,
           const typename Rule::Options& base, bool scaled, int block_size, bool stochastic) {
  std::mt19937 random(7);
  std::vector<TensorOf> gpu;
  for (const Shape& shape : kShapes)
    gpu.push_back(make_tensor<Rule>(shape, param_type, grad_type, block_size, random));
  for (int i = 0; i < kTinyOnes; i++)
    gpu.push_back(make_tensor<Rule>(kTiny, param_type, grad_type, block_size, random));
  const size_t without_many = gpu.size();
  if (Rule::kStates == 2 && !Rule::kMomentsNeedParam && (block_size == 256 || block_size == 512) &&
      stochastic)
    gpu.push_back(make_tensor<Rule>(many(block_size), param_type, grad_type, block_size, random));
  std::vector<TensorOf> cpu = gpu;
  for (size_t i = 0; i < gpu.size(); i++) {
    gpu[i].step = cpu[i].step = float(i % 7);
    gpu[i].has_factors = cpu[i].has_factors = i % 3 != 0;
    for (int k = 0; k < kFactors; k++)
      gpu[i].factors[k] = cpu[i].factors[k] = double(i % 5) * 0.3 + 0.1 * k;
    if (i == 11 || i == 20) gpu[i].factors[0] = cpu[i].factors[0] = NAN;  // they stay as they are
  }
  const uint64_t seed = 11;
  const std::string what = std::string(rule_name) + ", types " + std::to_string(int(param_type)) +
                           " and " + std::to_string(int(grad_type)) + ", " +
                           (scaled ? "blocks of " + std::to_string(block_size) : "32-bit state") +
                           (stochastic ? ", stochastic" : ", nearest") +
                           (kRounds ? ", parameters too" : "");
  for (int step = 1; step <= 4; step++) {
    typename Rule::Options options = base;
    options.lr = step == 3 ? 0.0 : double(1e-2f);
    for (size_t i = 0; i < gpu.size(); i++) {
      new_gradient(gpu[i], step, random);
      std::memcpy(cpu[i].place(cpu[i].grad, grad_type), gpu[i].place(gpu[i].grad, grad_type),
                  size_t(gpu[i].count()) * cuda::bytes_of(grad_type));
    }
    if (step == 4 && scaled && Rule::kStates > 0) {  // scales that are none
      gpu[0].scales[0][0] = cpu[0].scales[0][0] = -1e-6f;
      gpu[1].scales[0][1] = cpu[1].scales[0][1] = INFINITY;
      const int last = Rule::kStates - 1;
      gpu[6].scales[last][0] = cpu[6].scales[last][0] = -1e-12f;
    }
    const float found_inf = step == 2 ? 1.0f : 0.0f;
    StepNumbers<Rule> numbers = {options, seed, float(options.lr), float(options.grad_scale),
                                 found_inf};
    size_t k = 0;
    for (const auto& number : Rule::Options::kNumbers) numbers.rest[k++] = options.*number.value;
    numbers.rest_on_device = !stochastic;  // in half of the configurations
    if (!scaled) {
      cuda_element_step<Rule, T, kRounds>(gpu, type, numbers);
    } else if constexpr (Rule::kStates > 0) {
      cuda_block_step<Rule, T, kRounds>(gpu, type, numbers, block_size, stochastic);
    }
    if constexpr (kScalarsOf<Rule> > 0) cuda_write_scalars<Rule>(gpu, numbers, scaled);
    cuda_count(gpu.size(), [&](size_t k) { return &gpu[k].step; }, found_inf);
    if (found_inf == 0) {
      for (TensorOf& t : cpu)
        cpu_step<Rule>(t, options, scaled, block_size, stochastic, kRounds, seed);
    }
    compare(what + ", step " + std::to_string(step), gpu, cpu);
    gpu.resize(without_many);  // its random numbers have been seen
    cpu.resize(without_many);
  }
}

template <class Rule>
void check_rule(const char* name, const typename Rule::Options& options) {
  const FloatType f32 = FloatType::kFloat32, bf16 = FloatType::kBFloat16, f16 = FloatType::kFloat16;
  for (bool stochastic : {true, false}) {
    check<Rule, float>(name, f32, f32, f32, options, true, 256, stochastic);
#ifndef BRIEF
    check<Rule, BFloat16>(name, bf16, bf16, bf16, options, true, 256, stochastic);
    for (int block_size : {64, 512})
      check<Rule, float>(name, f32, f32, f32, options, true, block_size, stochastic);
    for (int block_size : {64, 256, 512})
      check<Rule, BFloat16, true>(name, bf16, bf16, bf16, options, true, block_size, stochastic);
#endif
#ifndef QUICK
    check<Rule, BFloat16, true>(name, bf16, bf16, f32, options, true, 256, stochastic);
    check<Rule, BFloat16, true>(name, bf16, f32, f32, options, true, 256, stochastic);
    check<Rule, Half>(name, f16, f16, f16, options, true, 256, stochastic);
    check<Rule, BFloat16>(name, bf16, bf16, f32, options, true, 256, stochastic);
    check<Rule, float>(name, f32, f32, f16, options, true, 256, stochastic);
    for (int block_size : {128, 2048})
      check<Rule, float>(name, f32, f32, f32, options, true, block_size, stochastic);
#endif
  }
#ifndef BRIEF
  check<Rule, float>(name, f32, f32, f32, options, false, 256, false);
  check<Rule, BFloat16, true>(name, bf16, bf16, bf16, options, false, 256, false);
#endif
#ifndef QUICK
  check<Rule, BFloat16, true>(name, bf16, bf16, f32, options, false, 256, false);
  check<Rule, BFloat16>(name, bf16, bf16, bf16, options, false, 256, false);
  check<Rule, float>(name, f32, bf16, f32, options, false, 256, false);
  check<Rule, Half>(name, f16, f16, f16, options, false, 256, false);
#endif
}

// A shorter check of a rule. The kernels handle types, blocks and memory alike for all rules, which
// the checks of Adam show.
template <class Rule>
void check_briefly(const char* name, const typename Rule::Options& options) {
  const FloatType f32 = FloatType::kFloat32, bf16 = FloatType::kBFloat16;
  if constexpr (Rule::kStates > 0) {
    for (bool stochastic : {true, false}) {
      check<Rule, float>(name, f32, f32, f32, options, true, 256, stochastic);
      check<Rule, float>(name, f32, f32, f32, options, true, 64, stochastic);
    }
    check<Rule, BFloat16>(name, bf16, bf16, bf16, options, true, 512, true);
    check<Rule, BFloat16, true>(name, bf16, bf16, bf16, options, true, 256, true);
  }
  check<Rule, float>(name, f32, f32, f32, options, false, 256, false);
  check<Rule, BFloat16>(name, bf16, bf16, bf16, options, false, 256, false);
  check<Rule, BFloat16, true>(name, bf16, bf16, bf16, options, false, 256, false);
}

template <bool kSigned>
void check_codec(int block_size) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  const int64_t columns = 700, rows = 9;  // even: codes of 4 bits have no longer rows then
  std::vector<float> x(size_t(rows * columns));
  for (size_t i = 0; i < x.size(); i++) {
    x[i] = normal(random) * std::exp2(float(int(random() % 40)) - 30);
    if (!kSigned) x[i] = std::fabs(x[i]);
  }
  const size_t row = size_t(columns);
  for (size_t i = 0; i < row; i++) {
    x[row + i] = 0;
    x[2 * row + i] *= 1e-38f;
    x[3 * row + i] = std::ldexp(x[3 * row + i], 124);
  }
  x[4 * row] = NAN;
  x[5 * row + 1] = INFINITY;
  x[6 * row] = 3.4e38f;
  x[6 * row + 1] = kSigned ? -3.3e38f : 3.3e38f;
  const int64_t per_row = (columns + block_size - 1) / block_size, blocks = rows * per_row;
  const int64_t row_bytes = kFormat.bytes(columns);
  std::vector<uint8_t> codes(size_t(rows * row_bytes)), want(codes);
  std::vector<float> scales(size_t(blocks), -1.0f), want_scales(scales), back(x), want_back(x);
  cuda::QuantizeArguments q = {
      x.data(),          codes.data(),     scales.data(),       columns,
      uint32_t(per_row), uint32_t(blocks), int32_t(block_size), FloatType::kFloat32};
  cuda::DequantizeArguments d = {
      codes.data(),      scales.data(),    back.data(),         columns,
      uint32_t(per_row), uint32_t(blocks), int32_t(block_size), FloatType::kFloat32};
  emulation::launch(2, cuda::kThreads, [&] { cuda::quantize<kSigned, Format>(q, &kTables); });
  emulation::launch(2, cuda::kThreads, [&] { cuda::dequantize<kSigned, Format>(d, &kTables); });
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t column = block % per_row * block_size, begin = block / per_row * columns + column;
    const int n = int(std::min<int64_t>(block_size, columns - column));
    const CodecKernels& codec = scalar_kernels<Format>().codec;
    uint8_t* const to = want.data() + block / per_row * row_bytes + kFormat.bytes(column);
    want_scales[size_t(block)] = codec.quantize[kSigned](x.data() + begin, n, to);
    codec.dequantize[kSigned](to, n, want_scales[size_t(block)], want_back.data() + begin);
  }
  const int64_t n =
      differences(codes, want) + differences(scales, want_scales) + differences(back, want_back);
  if (n == 0) return;
  failures++;
  std::printf("codec, signed %d, blocks of %d: %ld codes, %ld scales, %ld values differ\n", kSigned,
              block_size, long(differences(codes, want)), long(differences(scales, want_scales)),
              long(differences(back, want_back)));
}

// Numbers at and above the last code's, as far as the tolerance of a scale leaves them, with the
// largest random number.
template <bool kSigned>
void check_largest_codes(MulawFormat) {
  using Codec = MulawFormat::Codec<kSigned>;
  cuda::mulaw::Encoding<false> encoding;
  encoding.set<kSigned, true>(Codec::kTop, 1.0f);
  float x[8];
  uint32_t hash[8], want[2] = {};
  for (int i = 0; i < 8; i++) {
    x[i] = Codec::kTop * (1.0f + float(i) * 0x1p-20f);
    hash[i] = ~0u << 4 * i;
    want[i / 4] |= Codec::encode(x[i], 1.0f, Codec::draw(hash[i]), !kSigned) << 8 * (i % 4);
  }
  const uint2 got =
      cuda::CodecOf<MulawFormat>::encode_eight_stochastic<kSigned>({}, x, encoding, hash);
  failures.add(encoding.scale != 1.0f || got.x != want[0] || got.y != want[1],
               "the largest mu-law codes");
}
template <bool kSigned>
void check_largest_codes(FourBitFormat) {
  float x[8], quotients[8];
  uint32_t hash[8], want = 0, want_levels = 0;
  for (int i = 0; i < 8; i++) {
    x[i] = FourBitSquares::kTop * (1.0f + float(i) * 0x1p-20f);
    hash[i] = ~0u << 4 * i;
    want |= FourBitSquares::encode(x[i], 1.0f, FourBitSquares::draw(hash[i])) << 4 * i;
    // The largest quotient, and some that are nearly as large, with both signs.
    quotients[i] = (i & 1 ? -1.0f : 1.0f) * (1.0f - float(i / 2) * 0x1p-22f);
    want_levels |= FourBitLevels::encode(quotients[i], 8.0f, FourBitLevels::draw(hash[i])) << 4 * i;
  }
  failures.add(cuda::four_bit::encode_squares(x, 1.0f, hash) != want, "the largest 4-bit codes");
  failures.add(cuda::four_bit::encode_levels(quotients, 8.0f, hash) != want_levels,
               "the largest 4-bit levels");
}
template <bool kSigned>
void check_largest_codes(DynamicFormat) {}

// What the scales of the mu-law format are divided by: the nearest quotient, to the bit.
void check_quotients() {
  std::mt19937 random(3);
  int64_t wrong = 0;
  for (int i = 0; i < 10000; i++) {
    const float a = std::ldexp(1.0f + float(random() >> 9) * 0x1p-23f, -1 - int(random() % 30));
    const float b = std::ldexp(1.0f + float(random() >> 9) * 0x1p-23f, int(random() % 120) - 60);
    wrong += cuda::mulaw::twice_quotient<false>(a, b) != 2.0f * (a / b);
  }
  failures.add(wrong != 0, "quotients");
}

// Every third float from 2^-32 up to the largest quotient of a value and its scale, in the dynamic
// format.
void check_every_nearest_code() {
  const cuda::dynamic::Tables tables = cuda::dynamic::make_tables();
  const scalar::dynamic::NearestEncoder<true> is_signed(codec_tables());
  const scalar::dynamic::NearestEncoder<false> is_unsigned(codec_tables());
  int64_t wrong = 0;
  for (uint32_t u = 0x2f800000u; u < 0x3f810000u; u += 3) {
    const float y = bits_float(u);
    uint8_t positive, negative, second;
    is_signed(y, 1.0f, &positive);
    is_signed(-y, 1.0f, &negative);
    is_unsigned(y, 1.0f, &second);
    wrong += cuda::dynamic::encode_nearest<true>(tables, y, 1.0f) != positive;
    wrong += cuda::dynamic::encode_nearest<true>(tables, -y, 1.0f) != negative;
    wrong += cuda::dynamic::encode_nearest<false>(tables, y, 1.0f) != second;
  }
  if (wrong == 0) return;
  failures++;
  std::printf("%ld codes of single numbers differ\n", long(wrong));
}

// Numbers that show what a rule does with each: decay rates of 0.9 and nearer to 1, schedules that
// end within the few steps here.
template <class Options>
Options options_of_family() {
  Options options = {};
  options.grad_scale = 4;
  double decay = 1;
  for (const auto& number : Options::kNumbers) {
    const std::string name = number.name;
    decay = number.range == Range::kDecayRate ? decay / 10 : decay;
    options.*number.value = number.range == Range::kDecayRate             ? 1 - decay
                            : name == "eps"                               ? 1e-8
                            : name == "momentum"                          ? 0.9
                            : name == "alpha" || name.rfind("t_", 0) == 0 ? 5
                                                                          : 0.1;
  }
  return options;
}

// Muon, whose calls mix types: a direction is bfloat16 beside gradients of any type, and takes the
// place of a gradient in the update. Rule: so that formats which do not take it compile.
template <class Rule = MuonRule>
void check_muon() {
  const FloatType f32 = FloatType::kFloat32, bf16 = FloatType::kBFloat16;
  MuonOptions options = options_of_family<MuonOptions>();
  check<MuonUpdateRule, float>("Muon, update", f32, f32, bf16, options, false, 256, false);
  if constexpr (Format::template kTakes<Rule>) {
    for (bool nesterov : {true, false}) {
      options.nesterov = nesterov;
      const char* name = nesterov ? "Muon, Nesterov" : "Muon";
      check<Rule, BFloat16>(name, bf16, bf16, f32, options, true, 256, false);
      check<Rule, BFloat16>(name, bf16, bf16, bf16, options, true, 256, false);
      check<Rule, BFloat16>(name, bf16, bf16, f32, options, false, 256, false);
    }
  }
}

// Every rule of every family, without flags and with all of them.
void check_families() {
  for_each_type(Families(), [](auto family) {
    using Family = typename decltype(family)::type;
    using Options = typename Family::Options;
    for_each_type(typename Family::Rules(), [](auto rule) {
      using Rule = typename decltype(rule)::type;
      if constexpr (Rule::kStates == 0 || Format::template kTakes<Rule>) {
        Options options = options_of_family<Options>();
        const std::string name =
            std::string(Family::kName) + " with " + std::to_string(Rule::kStates) + " states";
        check_briefly<Rule>(name.c_str(), options);
        for (const auto& flag : Options::kFlags) options.*flag.value = true;
        check_briefly<Rule>((name + ", all flags").c_str(), options);
      }
    });
  });
}

#ifndef ONLY_MUON
void check_rules() {
  check_counts();
  check_largest_codes<false>(Format());
  if (std::is_same_v<Format, MulawFormat>) check_quotients();
  AdamOptions decoupled = {};
  decoupled.beta1 = 0.9;
  decoupled.beta2 = 0.999;
  decoupled.eps = 1e-8;
  decoupled.weight_decay = 0.1;
  decoupled.grad_scale = 1;
  decoupled.decoupled = true;
  AdamOptions coupled = decoupled;
  coupled.decoupled = false;
  coupled.maximize = true;
  coupled.grad_scale = 4;
  coupled.eps = 0;
  check_rule<AdamRule<false, true>>("AdamW", decoupled);
#ifndef BRIEF
  if constexpr (Format::kBits < 8) {  // without roots
    const FloatType f32 = FloatType::kFloat32;
    for (int block_size : {64, 256})
      check<LionRule, float>("Lion", f32, f32, f32, options_of_family<LionOptions>(), true,
                             block_size, true);
  }
#endif
#ifndef QUICK
  check_rule<AdamRule<true, true>>("AdamW, amsgrad", decoupled);
  check_rule<AdamRule<false, false>>("Adam", coupled);
  check_rule<AdamRule<true, false>>("Adam, amsgrad", coupled);
  check_families();
  for (int block_size : {64, 256, 2048}) {
    check_codec<true>(block_size);
    check_codec<false>(block_size);
  }
  if (std::is_same_v<Format, DynamicFormat>) check_every_nearest_code();
  check_muon();
#endif
}
#endif

}  // namespace

int main() {
#ifdef ONLY_MUON
  check_muon();
#endif
#ifndef ONLY_MUON
  check_rules();
#endif
  std::printf("%d configurations differ\n", failures.count);
  return failures.count != 0;
}
