// The loops over memory, written once for every instruction set and rule. An isa_*.cpp includes
// this after the vector type F and the codec of its set, with TORCHAO8_ISA naming their namespace.
//
// A block takes two passes. The first decodes the state, computes the new moments into buffers in
// the first-level cache and finds the extreme elements; the second updates the parameter and
// encodes.
//
// On the vector paths a block with an element that is not usable (a gradient that is NaN or
// infinite, or whose square overflows) is found after the first pass, when nothing has been
// written, and left to the scalar path, which selects for each element. The common case pays
// nothing for it.

namespace torchao8::TORCHAO8_ISA {

// Applies f to 0, 1, ... N-1 as constants, so that each state's sign is known when compiling.
template <int N, class Function>
TORCHAO8_HD void for_each_state(Function f) {
  if constexpr (N > 0) f(std::integral_constant<int, 0>());
  if constexpr (N > 1) f(std::integral_constant<int, 1>());
  if constexpr (N > 2) f(std::integral_constant<int, 2>());
}

// Where all states are usable: neither NaN nor infinite nor close to it, nor negative if unsigned.
// Without states, where the first value is.
template <class Rule>
TORCHAO8_HD Mask all_in_range(const F* values) {
  Mask good = in_range<Rule::kSigned[0]>(values[0]);
  for_each_state<Rule::kStates>(
      [&](auto s) TORCHAO8_LAMBDA { good = both(good, in_range<Rule::kSigned[s]>(values[s])); });
  return good;
}

// Whether a rule has an unsigned state, whose extreme element tells of NaN. If not, all elements of
// a signed one go into a sum of zeros.
template <class Rule>
constexpr bool has_unsigned() {
  for (int s = 0; s < Rule::kStates; s++) {
    if (!Rule::kSigned[s]) return true;
  }
  return false;
}
struct NanFinder {
  F sum;
  TORCHAO8_HD NanFinder() : sum(0.0f) {}
  TORCHAO8_HD void add(F v) { sum = fma(v, F(0.0f), sum); }
  TORCHAO8_HD bool found() const { return !all(in_range<true>(sum)); }
};

// Elements ahead of the ones at work that are asked for from memory. The hardware's own prefetchers
// stop at pages of 4 KiB, and a block spends its time in four arrays at once.
constexpr int kAhead = 768;

TORCHAO8_HD void prefetch(const void* p) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(p);
#endif
}

// One block's place in memory.
template <class Rule, class T>
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
      codes[s] += length;
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

// The values of two blocks, in units, that follow each other around a ring.
template <int N>
struct Ring {
  alignas(64) float values[N][2 * kMaxBlock];
  int end;  // of the second block, where the first one follows

  TORCHAO8_HD int wrap(int at) const { return at < end ? at : at - end; }
  TORCHAO8_HD void load_at(int at, F* to) const {
    for (int v = 0; v < N; v++) to[v] = load(values[v] + at);
  }
};

// What the second pass needs to know of a block. Not good: an element is not usable.
template <int N>
struct alignas(64) Plan {
  float extreme[N], inverse[N];
  BlockRandom random[N];
  bool good;
};

// First pass: decode, compute the moments into the ring, find the extreme elements. Called for each
// vector of the block in turn, then finish(). On the vector paths it writes nothing but the ring.
template <class Rule, class T, bool kRounds>
struct Moments {
  static constexpr int N = Rule::kStates, kValues = Rule::kValues;
  static constexpr bool kSelect = kWidth == 1;
  Decoder<true> decode_signed;
  Decoder<false> decode_unsigned;
  Extreme<true> extreme_signed[N];
  Extreme<false> extreme_unsigned[N];
  NanFinder nan;
  ParamWriter<kSelect && kRounds> write;
  Block<Rule, T> block;
  Ring<kValues>& ring;
  int place;  // of the block's first element in the ring
  float scale[N];
  Rule rule;

  TORCHAO8_HD Moments(const Rule& r, const CodecTables& t, const Block<Rule, T>& b,
                      Ring<kValues>& to, int at)
      : decode_signed(t), decode_unsigned(t), block(b), ring(to), place(at) {
    for (int s = 0; s < N; s++) scale[s] = *block.scales[s];
    rule = r.with_scales(scale);
    write.start(block.param_key, block.first_element);
  }

  TORCHAO8_HD void operator()(int i) {
    if constexpr (!kSelect) {
      prefetch(block.grad + i + kAhead);
      prefetch(block.param + i + kAhead);
      for (int s = 0; s < N; s++) prefetch(block.codes[s] + i + kAhead);
    }
    F old[N], values[kValues], p(0.0f);
    for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
      if constexpr (Rule::kSigned[s]) {
        old[s] = decode_signed(block.codes[s] + i);
      } else {
        old[s] = decode_unsigned(block.codes[s] + i);
      }
      values[s] = old[s];
    });
    if constexpr (Rule::kMomentsNeedParam) p = load(block.param + i);
    rule.template moments<true>(p, load(block.grad + i), values);
    if constexpr (kSelect) {
      const Mask good = all_in_range<Rule>(values);
      if (all(good)) {
        write(block.param + i, update<true>(rule, load(block.param + i), values));
      } else {
        write.skip();
      }
      for (int s = 0; s < N; s++)
        values[s] = select(good, values[s], old[s] * F(scale[s] / rule.unit[s]));
    }
    for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
      if constexpr (Rule::kSigned[s]) {
        extreme_signed[s].add(values[s]);
      } else {
        extreme_unsigned[s].add(values[s]);
      }
    });
    if constexpr (!has_unsigned<Rule>() && !kSelect) nan.add(values[0]);
    for (int v = 0; v < kValues; v++) store(ring.values[v] + place + i, values[v]);
  }

  template <bool kStochastic>
  TORCHAO8_HD void finish(Plan<N>& plan, const BlockRun& run) const {
    bool good = !nan.found();
    for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
      plan.extreme[s] =
          Rule::kSigned[s] ? extreme_signed[s].result() : extreme_unsigned[s].result();
      if (run.extremes) {  // the block's own one has told whether its elements are usable
        good = good && usable<Rule::kSigned[s]>(plan.extreme[s]);
        plan.extreme[s] = run.extremes[s];
      }
      plan.inverse[s] = inverse_of<Rule::kSigned[s]>(plan.extreme[s]);
      if constexpr (kStochastic && Rule::kStochastic[s]) {
        plan.random[s].start(run.keys[s], block.first_element);
      }
      // decay: the stored scale may overflow in units, or be none at all
      good = good && usable<Rule::kSigned[s]>(scale[s]) && usable<true>(rule.decay[s]) &&
             usable<Rule::kSigned[s]>(plan.extreme[s]) &&
             usable<true>(plan.extreme[s] * rule.unit[s]);
    });
    plan.good = kSelect || good;
  }
};

// The rule's two long operations, started before their results are needed: the root two vectors
// ahead, the step one. Around the ring that goes on from block to block.
template <class Rule>
struct Pipeline {
  F root, step;
  bool full;
  TORCHAO8_HD Pipeline() : root(0.0f), step(0.0f), full(false) {}

  TORCHAO8_HD void start_root(const Rule& rule, const Ring<Rule::kValues>& ring, int at) {
    F values[Rule::kValues];
    ring.load_at(at, values);
    root = rule.template root<true>(values);
  }
  TORCHAO8_HD void start_step(const Rule& rule, const Ring<Rule::kValues>& ring, int at) {
    F values[Rule::kValues];
    ring.load_at(at, values);
    step = rule.step(values, root);
  }
  TORCHAO8_HD void fill(const Rule& rule, const Ring<Rule::kValues>& ring, int at) {
    if (full) return;
    start_root(rule, ring, at);
    start_step(rule, ring, at);
    start_root(rule, ring, ring.wrap(at + kWidth));
    full = ring.end >= 4 * kWidth;  // with blocks of one vector, two ahead is not in the ring
  }
  // The step of the vector at this place.
  TORCHAO8_HD F next(const Rule& rule, const Ring<Rule::kValues>& ring, int at) {
    const F now = step;
    start_step(rule, ring, ring.wrap(at + kWidth));
    start_root(rule, ring, ring.wrap(at + 2 * kWidth));
    return now;
  }
};

// Second pass: update the parameter (the scalar path has done it), encode the states in the ring.
template <class Rule, class T, bool kStochastic, bool kRounds>
struct UpdateAndEncode {
  static constexpr int N = Rule::kStates, kValues = Rule::kValues;
  // Faster with the stochastic encoder in the loop, slower without it (benchmarks/NOTES.md).
  static constexpr bool kPipelined = kStochastic && kWidth > 1;
  NearestEncoder<true> encode_signed;
  NearestEncoder<false> encode_unsigned;
  StochasticEncoder<true> encode_signed_randomly;
  StochasticEncoder<false> encode_unsigned_randomly;
  RandomStream stream[N];
  ParamWriter<(kWidth > 1) && kRounds> write;
  Block<Rule, T> block;
  const Ring<kValues>& ring;
  int place;
  const Plan<N>& plan;
  Pipeline<Rule>& pipeline;
  float inverse[N];
  Rule rule;

  TORCHAO8_HD UpdateAndEncode(const Rule& r, const CodecTables& t, const Block<Rule, T>& b,
                              const Ring<kValues>& from, int at, const Plan<N>& p,
                              Pipeline<Rule>& line)
      : encode_signed(t),
        encode_unsigned(t),
        encode_signed_randomly(t),
        encode_unsigned_randomly(t),
        block(b),
        ring(from),
        place(at),
        plan(p),
        pipeline(line),
        rule(r) {
    for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
      inverse[s] = p.inverse[s];
      if constexpr (kStochastic && Rule::kStochastic[s]) stream[s].start(p.random[s]);
    });
    write.start(block.param_key, block.first_element);
    if constexpr (kPipelined) pipeline.fill(rule, ring, place);
  }

  TORCHAO8_HD void operator()(int i) {
    F values[kValues];
    ring.load_at(place + i, values);
    if constexpr (kPipelined) {
      const F step = pipeline.next(rule, ring, place + i);
      write.quiet(block.param + i, rule.apply(load(block.param + i), step));
    }
    for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
      if constexpr (kStochastic && Rule::kStochastic[s] && Rule::kSigned[s]) {
        encode_signed_randomly(values[s], inverse[s], stream[s].next(), block.codes[s] + i);
      } else if constexpr (kStochastic && Rule::kStochastic[s]) {
        encode_unsigned_randomly(values[s], inverse[s], stream[s].next(), block.codes[s] + i);
      } else if constexpr (Rule::kSigned[s]) {
        encode_signed(values[s], inverse[s], block.codes[s] + i);
      } else {
        encode_unsigned(values[s], inverse[s], block.codes[s] + i);
      }
    });
    if constexpr (!kPipelined && kWidth > 1)
      write.quiet(block.param + i, update<true>(rule, load(block.param + i), values));
  }

  TORCHAO8_HD void finish(int length) const {
    for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
      *block.scales[s] = final_scale<Rule::kSigned[s], true>(plan.extreme[s], rule.unit[s], length,
                                                             block.codes[s]);
    });
  }
};

template <class Rule, class T>
TORCHAO8_COLD void scalar_block(const Rule& rule, const CodecTables& tables,
                                const Block<Rule, T>& block, BlockRun run) {
  run.param = block.param;
  run.grad = block.grad;
  for (int s = 0; s < Rule::kStates; s++) {
    run.codes[s] = block.codes[s];
    run.scales[s] = block.scales[s];
  }
  run.blocks = 1;
  run.first_element = block.first_element;
  scalar_kernels<Rule>().template blocks<T>()(rule, tables, run);
}

// The second pass of a block goes together with the first pass of the next one, vector by vector:
// neither waits for the other, and the divider, the look-ups and the arithmetic are all kept busy.
template <class Rule, class T, bool kStochastic, bool kRounds>
void step_blocks(const Rule& rule, const CodecTables& tables, const BlockRun& run) {
  constexpr int N = Rule::kStates;
  using First = Moments<Rule, T, kRounds>;
  using Second = UpdateAndEncode<Rule, T, kStochastic, kRounds>;
  const int length = run.length;
  Ring<Rule::kValues> ring;
  ring.end = 2 * length;
  for (auto& values : ring.values) {  // what is read ahead of a run of one block
    store(values + length, F(0.0f));
    store(values + length + kWidth, F(0.0f));
  }
  Plan<N> plans[2];
  Pipeline<Rule> pipeline;
  Block<Rule, T> block(run);

  First head(rule, tables, block, ring, 0);
  for (int i = 0; i < length; i += kWidth) head(i);
  head.template finish<kStochastic>(plans[0], run);
  for (int64_t k = 0; k + 1 < run.blocks; k++) {
    const int now = int(k & 1);
    Block<Rule, T> next = block;
    next.advance(length);
    First first(rule, tables, next, ring, now ? 0 : length);
    if (plans[now].good) {
      Second second(rule, tables, block, ring, now ? length : 0, plans[now], pipeline);
      for (int i = 0; i < length; i += kWidth) {
        first(i);
        second(i);
      }
      second.finish(length);
    } else {
      scalar_block(rule, tables, block, run);
      for (int i = 0; i < length; i += kWidth) first(i);
      pipeline.full = false;
    }
    first.template finish<kStochastic>(plans[!now], run);
    block = next;
  }
  const int now = int((run.blocks - 1) & 1);
  if (plans[now].good) {
    Second second(rule, tables, block, ring, now ? length : 0, plans[now], pipeline);
    for (int i = 0; i < length; i += kWidth) second(i);
    second.finish(length);
  } else {
    scalar_block(rule, tables, block, run);
  }
}

template <class Rule, class T>
void step_blocks_of(const Rule& rule, const CodecTables& tables, const BlockRun& run) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (run.rounds_param) {
      run.stochastic ? step_blocks<Rule, T, true, true>(rule, tables, run)
                     : step_blocks<Rule, T, false, true>(rule, tables, run);
      return;
    }
  }
  run.stochastic ? step_blocks<Rule, T, true, false>(rule, tables, run)
                 : step_blocks<Rule, T, false, false>(rule, tables, run);
}

template <class Rule, class T, class Write>
TORCHAO8_HD void step_vector(const Rule& r, T* param, const T* grad, float* const* states,
                             Write& write) {
  constexpr int N = Rule::kStates;
  F old[N + 1], values[Rule::kValues];
  for (int s = 0; s < N; s++) values[s] = old[s] = load(states[s]);
  const F p = load(param);
  r.template moments<false>(p, load(grad), values);
  const Mask good = all_in_range<Rule>(values);
  for (int s = 0; s < N; s++) store(states[s], select(good, values[s], old[s]));
  write(param, select(good, update<false>(r, p, values), p));
}

// Elements [i, end): as vectors, and at the end what fills none.
template <class Rule, class T, class Write>
TORCHAO8_HD void step_vectors(const Rule& r, const ElementRun& run, int64_t i, int64_t end,
                              Write& write) {
  constexpr int N = Rule::kStates;
  T* param = static_cast<T*>(run.param);
  const T* grad = static_cast<const T*>(run.grad);
  for (; i + kWidth <= end; i += kWidth) {
    float* states[kMaxStates];
    for (int s = 0; s < N; s++) states[s] = run.states[s] + i;
    step_vector(r, param + i, grad + i, states, write);
  }
  const size_t left = size_t(end - i);
  if (left == 0) return;
  T tail_param[kWidth] = {}, tail_grad[kWidth] = {};
  float tail[kMaxStates][kWidth] = {};
  float* states[kMaxStates];
  std::memcpy(tail_param, param + i, left * sizeof(T));
  std::memcpy(tail_grad, grad + i, left * sizeof(T));
  for (int s = 0; s < N; s++) {
    std::memcpy(tail[s], run.states[s] + i, left * sizeof(float));
    states[s] = tail[s];
  }
  step_vector(r, tail_param, tail_grad, states, write);
  std::memcpy(param + i, tail_param, left * sizeof(T));
  for (int s = 0; s < N; s++) std::memcpy(run.states[s] + i, tail[s], left * sizeof(float));
}

// The parameter rounded stochastically: a block of random numbers after the other. What lies before
// the first whole vector of a block takes its numbers one by one.
template <class Rule>
void step_elements_rounded(const Rule& r, const ElementRun& run) {
  struct WriteHead {
    uint32_t hashes[kWidth];
    TORCHAO8_HD void operator()(BFloat16* x, F v) const { store(x, v, load_hashes(hashes)); }
  };
  int64_t i = 0;
  if (const int64_t before = int64_t(run.first_element % kWidth)) {
    const int64_t rest = kWidth - before, count = rest < run.count ? rest : run.count;
    WriteHead write = {};
    ElementRandom random(run.param_key);
    for (int64_t k = 0; k < count; k++) write.hashes[k] = random(run.first_element + uint64_t(k));
    step_vectors<Rule, BFloat16>(r, run, 0, count, write);
    i = count;
  }
  while (i < run.count) {
    const uint64_t element = run.first_element + uint64_t(i);
    const uint32_t inside = uint32_t(element % kRandomBlock);
    const int64_t rest = run.count - i, here = kRandomBlock - inside;
    const int64_t end = i + (here < rest ? here : rest);
    ParamWriter<true> write;
    write.start(run.param_key, element - inside, inside);
    step_vectors<Rule, BFloat16>(r, run, i, end, write);
    i = end;
  }
}

template <class Rule, class T>
void step_elements(const Rule& rule, const ElementRun& run) {
  const Rule r = rule;
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (run.rounds_param) return step_elements_rounded(r, run);
  }
  ParamWriter<false> write;
  step_vectors<Rule, T>(r, run, 0, run.count, write);
}

// The first pass alone, over a tensor with one scale: the extreme elements. An element that is not
// usable counts with its old state, which it keeps.
template <class Rule, class T>
void find_extremes(const Rule& r, const CodecTables& tables, const ExtremeRun& run, float* found) {
  constexpr int N = Rule::kStates;
  const Decoder<true> decode_signed(tables);
  const Decoder<false> decode_unsigned(tables);
  const T *param = static_cast<const T*>(run.param), *grad = static_cast<const T*>(run.grad);
  const Rule rule = r.with_scales(run.scales);
  Extreme<true> extreme_signed[N];
  Extreme<false> extreme_unsigned[N];
  NanFinder nan[N];  // of a scale that is none
  for (int64_t i = 0; i < run.count; i += kWidth) {
    if constexpr (kWidth > 1) {
      prefetch(grad + i + kAhead);
      if constexpr (Rule::kMomentsNeedParam) prefetch(param + i + kAhead);
      for (int s = 0; s < N; s++) prefetch(run.codes[s] + i + kAhead);
    }
    F old[N], values[Rule::kValues], p(0.0f);
    for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
      if constexpr (Rule::kSigned[s]) {
        old[s] = decode_signed(run.codes[s] + i);
      } else {
        old[s] = decode_unsigned(run.codes[s] + i);
      }
      values[s] = old[s];
    });
    if constexpr (Rule::kMomentsNeedParam) p = load(param + i);
    rule.template moments<true>(p, load(grad + i), values);
    const Mask good = all_in_range<Rule>(values);
    for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
      const F v = select(good, values[s], old[s] * F(run.scales[s] / rule.unit[s]));
      if constexpr (Rule::kSigned[s]) {
        extreme_signed[s].add(v);
        nan[s].add(v);
      } else {
        extreme_unsigned[s].add(v);
      }
    });
  }
  for_each_state<N>([&](auto s) TORCHAO8_LAMBDA {
    if constexpr (Rule::kSigned[s]) {
      found[s] = nan[s].found() ? bits_float(0x7fc00000u) : extreme_signed[s].result();
    } else {
      found[s] = extreme_unsigned[s].result();
    }
  });
}

template <class Rule>
constexpr StepKernels<Rule> make_step_kernels() {
  StepKernels<Rule> kernels = {
      nullptr, nullptr, step_elements<Rule, float>, step_elements<Rule, BFloat16>,
      nullptr, nullptr};
  if constexpr (Rule::kStates > 0) {
    kernels.blocks_float32 = step_blocks_of<Rule, float>;
    kernels.blocks_bfloat16 = step_blocks_of<Rule, BFloat16>;
    kernels.extremes_float32 = find_extremes<Rule, float>;
    kernels.extremes_bfloat16 = find_extremes<Rule, BFloat16>;
  }
  return kernels;
}

}  // namespace torchao8::TORCHAO8_ISA
