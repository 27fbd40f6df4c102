// The CPU engine: cuts the tensors of one op call into blocks, shares them among torch's threads,
// and hands runs of them to the kernels of the instruction set in use. Of a rule it knows how many
// states it has, their signs and units; the kernels do a step's arithmetic and encode the new
// state.
//
// Every block is computed alone, so nothing depends on how they are shared out.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "codec/block_layout.h"
#include "cpu/codec_tables.h"
#include "cpu/kernel_tables.h"
#include "cpu/memory.h"
#if TORCHAO8_X86
#include <xmmintrin.h>
#endif

namespace torchao8 {

// Rounding to nearest with subnormal numbers, whatever the calling thread was set to
// (torch.set_flush_denormal): the results must not depend on which thread took a block.
class DefaultFloatingPoint {
#if TORCHAO8_X86
 public:
  DefaultFloatingPoint() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatingPoint() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

// The rule and the keys of random numbers. Tensors at the same step, with the same factors, share
// them.
template <class Rule>
struct StepOfRule {
  Rule rule;
  uint64_t keys[kMaxStates] = {}, param_key = 0;
};

// One tensor and its state: 8-bit where codes are set, else 32-bit.
template <class Rule>
struct Item {
  const StepOfRule<Rule>* step = nullptr;
  FloatArray param, grad;
  uint8_t* codes[kMaxStates] = {};
  float* scales[kMaxStates] = {};
  float* states[kMaxStates] = {};
  bool rounds_param = false;        // stochastically
  bool one_scale = false;           // whether all blocks share a scale, that of
  float extremes[kMaxStates] = {};  // these extreme elements, in units
  int64_t rows = 1, row_length = 0, units_per_row = 0;
  int64_t shard_offset = 0, row_stride = 0;  // global index of the first element; between rows
  int64_t run_length = 0;                    // of 32-bit state: elements of what is a row then
  int64_t first_cost = 0, unit_cost = 0;     // where its work begins in the sum of all
  int64_t units() const { return rows * units_per_row; }
  bool direct() const {  // the kernels can work on the memory itself
    return param.dense() && grad.dense() && param.type() == grad.type() &&
           param.type() != FloatType::kFloat16;
  }
};

template <class Rule>
class Engine {
 public:
  // state_format: its number, of 8-bit state.
  Engine(int64_t block_size, bool stochastic, int64_t state_format, size_t items)
      : block_size_(block_size),
        stochastic_(stochastic),
        format_(format_info(state_format)),
        blocks_(block_kernels<Rule>(format_kernels(state_format))) {
    items_.reserve(items);
  }

  // fill(item) makes the item where it is to stay.
  template <class Fill>
  void add(Fill fill) {
    Item<Rule>& item = items_.emplace_back();
    fill(item);
    if (item.one_scale) with_one_scale_.push_back(item);  // a part of a tensor may be empty
    if (item.units() == 0) return items_.pop_back();
    const bool blocks = item.codes[0] != nullptr;
    const int64_t unit = blocks ? block_size_ : kChunk;
    item.unit_cost = std::min(unit, item.row_length) * (item.direct() ? 1 : 4) + kUnitOverhead;
    item.first_cost = total_cost_;
    total_cost_ += item.units() * item.unit_cost;
  }

  void run() const {
    torch::stable::parallel_for(0, total_cost_, kGrain, [this](int64_t begin, int64_t end) {
      const DefaultFloatingPoint guard;
      const auto after = [](int64_t cost, const Item<Rule>& item) {
        return cost < item.first_cost;
      };
      auto item = std::upper_bound(items_.begin(), items_.end(), begin, after) - 1;
      for (; item != items_.end() && item->first_cost < end; ++item) {
        // A unit belongs to the thread in whose share it starts.
        const int64_t first = units_before(*item, begin), last = units_before(*item, end);
        if (first == last) continue;
        if (item->codes[0]) {
          step_blocks(*item, first, last);
        } else {
          step_elements(*item, first * kChunk, std::min(last * kChunk, item->row_length));
        }
      }
    });
  }

  // Of tensors with one scale, when all of their blocks have been stepped with the old one.
  void write_scales() const {
    for (const Item<Rule>& item : with_one_scale_) {
      for (int s = 0; s < Rule::kStates; s++) {
        const auto scale_of = format_.scale_of[Rule::kSigned[s]][Rule::kStochastic[s]];
        *item.scales[s] = scale_of(item.extremes[s], item.step->rule.unit[s]);
      }
    }
  }

  static int64_t chunks(int64_t count) { return (count + kChunk - 1) / kChunk; }

 private:
  static constexpr int64_t kChunk = 1024;        // elements of 32-bit state in a unit of work
  static constexpr int64_t kUnitOverhead = 64;   // cost of a unit without its elements
  static constexpr int64_t kRunOfOneScale = 64;  // blocks
  static constexpr int64_t kGrain = 32768;       // less work than this is not worth a thread

  static int64_t units_before(const Item<Rule>& item, int64_t cost) {
    const int64_t inside = std::max<int64_t>(0, cost - item.first_cost);
    return std::min(item.units(), (inside + item.unit_cost - 1) / item.unit_cost);
  }

  // Units [first, last) of an 8-bit tensor: whole blocks in runs, a row's short last block alone.
  void step_blocks(const Item<Rule>& item, int64_t first, int64_t last) const {
    const bool seamless = item.row_length % block_size_ == 0 && item.row_stride == item.row_length;
    const int64_t whole = item.row_length / block_size_;
    const int64_t row_bytes = format_.bytes(item.row_length);
    while (first < last) {
      const int64_t row = first / item.units_per_row, column = first % item.units_per_row;
      const int64_t begin = row * item.row_length + column * block_size_;
      int64_t count = 1, length = item.row_length - column * block_size_;
      if (length >= block_size_) {
        count = seamless ? last - first : std::min(last - first, whole - column);
        length = block_size_;
      }
      float one_scale[kMaxStates][kRunOfOneScale];
      if (item.one_scale) count = std::min(count, kRunOfOneScale);
      BlockRun run = {};
      run.tables = &tables_;
      run.blocks = count;
      run.length = int(length);
      run.stochastic = stochastic_;
      run.rounds_param = item.rounds_param;
      run.param_key = item.step->param_key;
      run.first_element = uint64_t(item.shard_offset) + uint64_t(row) * uint64_t(item.row_stride) +
                          uint64_t(column * block_size_);
      const int64_t codes = row * row_bytes + format_.bytes(column * block_size_);
      for (int s = 0; s < Rule::kStates; s++) {
        run.codes[s] = item.codes[s] + codes;
        run.scales[s] = item.scales[s] + first;
        run.keys[s] = item.step->keys[s];
        if (!item.one_scale) continue;
        // The kernels write the scale of each block. The one scale is still needed by other blocks,
        // so each block gets a copy; write_scales() writes the new one at the end.
        run.scales[s] = one_scale[s];
        std::fill_n(run.scales[s], count, *item.scales[s]);
      }
      if (item.one_scale) run.extremes = item.extremes;
      if (item.direct() && format_.padding(int(length)) == 0) {
        run.param = item.param.at(begin);
        run.grad = item.grad.at(begin);
        blocks_.step.of(item.param.type())(item.step->rule, run);
      } else {
        step_staged(item, begin, run);
      }
      first += count;
    }
  }

  // Blocks that the kernels cannot take from memory, because of types, strides or an odd length, go
  // through buffers as float32, padded with elements that have no gradient and no state.
  void step_staged(const Item<Rule>& item, int64_t begin, BlockRun run) const {
    alignas(64) float param[kMaxBlock], grad[kMaxBlock];
    alignas(64) uint8_t codes[kMaxStates][kMaxBlock];
    uint8_t* home[kMaxStates];
    const int length = run.length;
    const int padded = length + format_.padding(length);
    const size_t bytes = size_t(format_.bytes(length)), all = size_t(format_.bytes(padded));
    const int64_t blocks = run.blocks;
    for (int s = 0; s < Rule::kStates; s++) {
      home[s] = run.codes[s];
      run.codes[s] = codes[s];
    }
    run.param = param;
    run.grad = grad;
    run.rounds_param = false;  // it is rounded below, when it is written to the tensor
    run.length = padded;
    run.blocks = 1;
    for (int64_t block = 0; block < blocks; block++) {
      item.param.read(convert_, begin, length, param);
      item.grad.read(convert_, begin, length, grad);
      std::fill(param + length, param + padded, 0.0f);
      std::fill(grad + length, grad + padded, 0.0f);
      for (int s = 0; s < Rule::kStates; s++) {
        const uint8_t zero = format_.zero_byte[Rule::kSigned[s]];
        std::memcpy(codes[s], home[s], bytes);
        std::memset(codes[s] + bytes, zero, all - bytes);
        format_.clear_after(length, codes[s], zero);
      }
      blocks_.step.float32(item.step->rule, run);
      if (item.rounds_param) {
        BlockRandom random;
        random.start(item.step->param_key, run.first_element);
        uint32_t hashes[kMaxBlock];
        for (int i = 0; i < length; i++) hashes[i] = random(uint32_t(i));
        item.param.write(hashes, param, begin, length);
      } else {
        item.param.write(convert_, param, begin, length);
      }
      for (int s = 0; s < Rule::kStates; s++) {
        format_.clear_after(length, codes[s], format_.zero_byte[Rule::kSigned[s]]);
        std::memcpy(home[s], codes[s], bytes);
        home[s] += bytes;
        run.scales[s]++;
      }
      begin += length;
      run.first_element += uint64_t(length);
    }
  }

  // Elements [begin, end) of a tensor with 32-bit state, in runs that follow each other in the
  // whole tensor if its random numbers are needed.
  void step_elements(const Item<Rule>& item, int64_t begin, int64_t end) const {
    if (!item.rounds_param) return step_run(item, begin, end, 0);
    while (begin < end) {
      const int64_t row = begin / item.run_length, column = begin % item.run_length;
      const int64_t last = std::min(end, begin - column + item.run_length);
      step_run(item, begin, last,
               uint64_t(item.shard_offset) + uint64_t(row) * uint64_t(item.row_stride) +
                   uint64_t(column));
      begin = last;
    }
  }

  void step_run(const Item<Rule>& item, int64_t begin, int64_t end, uint64_t first_element) const {
    ElementRun run = {};
    run.rounds_param = item.rounds_param;
    run.param_key = item.step->param_key;
    run.first_element = first_element;
    for (int s = 0; s < Rule::kStates; s++) run.states[s] = item.states[s] + begin;
    if (item.direct()) {
      run.param = item.param.at(begin);
      run.grad = item.grad.at(begin);
      run.count = end - begin;
      return elements_.step.of(item.param.type())(item.step->rule, run);
    }
    alignas(64) float param[kChunk], grad[kChunk];
    run.param = param;
    run.grad = grad;
    run.rounds_param = false;  // it is rounded below, when it is written to the tensor
    for (; begin < end; begin += run.count) {
      run.count = std::min(kChunk, end - begin);
      item.param.read(convert_, begin, run.count, param);
      item.grad.read(convert_, begin, run.count, grad);
      elements_.step.float32(item.step->rule, run);
      if (item.rounds_param) {
        ElementRandom random(item.step->param_key);
        uint32_t hashes[kChunk];
        for (int64_t i = 0; i < run.count; i++) hashes[i] = random(first_element++);
        item.param.write(hashes, param, begin, run.count);
      } else {
        item.param.write(convert_, param, begin, run.count);
      }
      for (int s = 0; s < Rule::kStates; s++) run.states[s] += run.count;
    }
  }

  const int64_t block_size_;
  const bool stochastic_;
  const CodecTables& tables_ = codec_tables();
  const FormatInfo& format_;
  const BlockKernels<Rule>& blocks_;
  const ElementKernels<Rule>& elements_ = element_kernels<Rule>(element_table());
  const ConvertKernels& convert_ = convert_kernels();
  std::vector<Item<Rule>> items_, with_one_scale_;
  int64_t total_cost_ = 0;
};

}  // namespace torchao8
