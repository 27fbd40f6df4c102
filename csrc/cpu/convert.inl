// Types of floats converted, for every instruction set. An isa_*.cpp includes this after the vector
// type F of its set, with TORCHAO8_ISA naming their namespace.

namespace torchao8::TORCHAO8_ISA {

template <class T>
void widen_as(const void* from, int64_t n, float* to) {
  const T* x = static_cast<const T*>(from);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(to + i, load(x + i));
  for (; i < n; i++) to[i] = scalar::load(x + i);
}

template <class T>
void narrow_as(const float* from, int64_t n, void* to) {
  T* x = static_cast<T*>(to);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(x + i, load(from + i));
  for (; i < n; i++) scalar::store(x + i, from[i]);
}

inline void widen(FloatType type, const void* from, int64_t n, float* to) {
  switch (type) {
    case FloatType::kFloat32:
      return widen_as<float>(from, n, to);
    case FloatType::kBFloat16:
      return widen_as<BFloat16>(from, n, to);
    case FloatType::kFloat16:
      return widen_as<Half>(from, n, to);
  }
}

inline void narrow(FloatType type, const float* from, int64_t n, void* to) {
  switch (type) {
    case FloatType::kFloat32:
      return narrow_as<float>(from, n, to);
    case FloatType::kBFloat16:
      return narrow_as<BFloat16>(from, n, to);
    case FloatType::kFloat16:
      return narrow_as<Half>(from, n, to);
  }
}

}  // namespace torchao8::TORCHAO8_ISA
