// Where a block lies, and how its updated parameters are written.
#pragma once

namespace torchao8::TORCHAO8_ISA {

// Where one block lies in memory. kBits: of a code.
template <class Rule, class T, int kBits = 8>
struct Block {
  T* param;
  const T* grad;
  uint8_t* codes[Rule::kStates];
  float* scales[Rule::kStates];
  uint64_t first_element, param_key;

  TORCHAO8_HD explicit Block(const BlockRun& run)
      : param(static_cast<T*>(run.param)),
        grad(static_cast<const T*>(run.grad)),
        first_element(run.first_element),
        param_key(run.param_key) {
    for (int s = 0; s < Rule::kStates; s++) {
      codes[s] = run.codes[s];
      scales[s] = run.scales[s];
    }
  }
  TORCHAO8_HD void advance(int length) {
    param += length;
    grad += length;
    for (int s = 0; s < Rule::kStates; s++) {
      codes[s] += length * kBits / 8;
      scales[s]++;
    }
    first_element += uint64_t(length);
  }
};

// How updated parameters are written: to nearest, or stochastically, a block's in their order.
template <bool kRounds>
struct ParamWriter {
  TORCHAO8_HD void start(uint64_t, uint64_t) {}
  TORCHAO8_HD void skip() {}
  template <class T>
  TORCHAO8_HD void operator()(T* x, F v) {
    store(x, v);
  }
  template <class T>
  TORCHAO8_HD void quiet(T* x, F v) {
    store_quiet(x, v);
  }
};
template <>
struct ParamWriter<true> {
  RandomStream stream;
  // i: where in the block the first one is, a multiple of kWidth.
  TORCHAO8_HD void start(uint64_t key, uint64_t first_element, uint32_t i = 0) {
    BlockRandom random;
    random.start(key, first_element);
    stream.start(random, i);
  }
  TORCHAO8_HD void skip() { stream.next_hashes(); }
  TORCHAO8_HD void operator()(BFloat16* x, F v) { store(x, v, stream.next_hashes()); }
  TORCHAO8_HD void quiet(BFloat16* x, F v) { store_quiet(x, v, stream.next_hashes()); }
};

}  // namespace torchao8::TORCHAO8_ISA
