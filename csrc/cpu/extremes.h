// The extreme elements of the new states of tensors with one scale, found by torch's threads. A
// maximum does not ask in which order it is taken.
#pragma once

#include <algorithm>
#include <mutex>
#include <vector>

#include "cpu/engine.h"

namespace torchao8 {

template <class Rule>
class ExtremeFinder {
 public:
  explicit ExtremeFinder(int64_t state_format)
      : kernels_(block_kernels<Rule>(format_kernels(state_format))) {}

  // fill(item) makes the item. The keys, which are 0, are raised to those of what is found.
  template <class Fill>
  void add(Fill fill, int64_t* keys) {
    Part& part = items_.emplace_back();
    fill(part.item);
    part.elements = part.item.rows * part.item.row_length;
    part.keys = keys;
    part.item.first_cost = chunks_;
    chunks_ += Engine<Rule>::chunks(part.elements);
  }

  void run() const {
    std::mutex raising;
    torch::stable::parallel_for(0, chunks_, kGrainChunks, [&](int64_t begin, int64_t end) {
      const DefaultFloatingPoint guard;
      for (const Part& part : items_) {
        const int64_t first = std::max<int64_t>(0, begin - part.item.first_cost) * kChunk;
        const int64_t last = std::min(part.elements, (end - part.item.first_cost) * kChunk);
        if (first >= last) continue;
        int64_t keys[kMaxStates] = {};
        find(part.item, first, last, keys);
        const std::lock_guard<std::mutex> lock(raising);
        for (int s = 0; s < Rule::kStates; s++) part.keys[s] = std::max(part.keys[s], keys[s]);
      }
    });
  }

 private:
  struct Part {
    Item<Rule> item;
    int64_t elements = 0;
    int64_t* keys = nullptr;
  };
  static constexpr int64_t kChunk = 1024;  // elements, as Engine::chunks() has them
  static constexpr int64_t kGrainChunks = 32;

  static void raise(int64_t* keys, const float* found) {
    for (int s = 0; s < Rule::kStates; s++) {
      keys[s] = std::max(keys[s], Rule::kSigned[s] ? key_of_extreme<true>(found[s])
                                                   : key_of_extreme<false>(found[s]));
    }
  }

  void find(const Item<Rule>& item, int64_t begin, int64_t end, int64_t* keys) const {
    ExtremeRun run = {};
    for (int s = 0; s < Rule::kStates; s++) run.scales[s] = *item.scales[s];
    float found[kMaxStates];
    if (item.direct()) {
      run.count = (end - begin) / kWidest * kWidest;
      run.param = item.param.at(begin);
      run.grad = item.grad.at(begin);
      for (int s = 0; s < Rule::kStates; s++) run.codes[s] = item.codes[s] + begin;
      if (run.count > 0) {
        kernels_.extremes.of(item.param.type())(item.step->rule, run, found);
        raise(keys, found);
      }
      begin += run.count;
    }
    for (; begin < end; begin += kChunk)
      find_staged(item, begin, int(std::min(kChunk, end - begin)), run, keys);
  }

  // Goes through buffers of float32. They are padded with the last element, which does not change
  // the extreme one.
  void find_staged(const Item<Rule>& item, int64_t begin, int length, ExtremeRun run,
                   int64_t* keys) const {
    alignas(64) float param[kChunk], grad[kChunk];
    alignas(64) uint8_t codes[kMaxStates][kChunk];
    const int padded = (length + kWidest - 1) / kWidest * kWidest;
    item.param.read(convert_, begin, length, param);
    item.grad.read(convert_, begin, length, grad);
    std::fill(param + length, param + padded, param[length - 1]);
    std::fill(grad + length, grad + padded, grad[length - 1]);
    for (int s = 0; s < Rule::kStates; s++) {
      std::memcpy(codes[s], item.codes[s] + begin, size_t(length));
      std::fill(codes[s] + length, codes[s] + padded, codes[s][length - 1]);
      run.codes[s] = codes[s];
    }
    run.param = param;
    run.grad = grad;
    run.count = padded;
    float found[kMaxStates];
    kernels_.extremes.float32(item.step->rule, run, found);
    raise(keys, found);
  }

  const BlockKernels<Rule>& kernels_;
  const ConvertKernels& convert_ = convert_kernels();
  std::vector<Part> items_;
  int64_t chunks_ = 0;
};

}  // namespace torchao8
