// The mu-law codec as functions that Python can call: a library for test_mulaw_codec.py, with each
// kind of codes and each number of mantissa bits that the test wants.
#include "formats/mulaw.h"

using namespace torchao8;

namespace {

template <bool kSigned, int kMantissaBits>
struct Exported {
  using Codec = MulawCodec<kSigned, kMantissaBits>;

  static void decode(const uint8_t* bytes, int64_t n, float* values) {
    for (int64_t i = 0; i < n; i++) values[i] = Codec::decode(bytes[i]);
  }
  static void encode(const float* x, const uint32_t* hashes, int64_t n, float inverse, float scale,
                     uint8_t* bytes) {
    const uint32_t floor = Codec::least_code(scale);
    for (int64_t i = 0; i < n; i++) {
      const uint32_t added = hashes ? Codec::draw(hashes[i]) : Codec::kHalf;
      bytes[i] = uint8_t(Codec::encode(x[i], inverse, added, floor));
    }
  }
  static void scales(const float* extremes, int64_t n, float unit, bool still, float* scale,
                     float* inverse) {
    for (int64_t i = 0; i < n; i++) {
      scale[i] = still ? Codec::template scale_of<true>(extremes[i], unit)
                       : Codec::template scale_of<false>(extremes[i], unit);
      inverse[i] = Codec::inverse_of(scale[i], unit);
    }
  }
};

using Kind = Exported<SIGNED, MANTISSA>;

}  // namespace

extern "C" {
float top() {
  return Kind::Codec::kTop;
}
void decode(const uint8_t* bytes, int64_t n, float* values) {
  Kind::decode(bytes, n, values);
}
void encode(const float* x, const uint32_t* hashes, int64_t n, float inverse, float scale,
            uint8_t* bytes) {
  Kind::encode(x, hashes, n, inverse, scale, bytes);
}
void scales(const float* extremes, int64_t n, float unit, bool still, float* scale,
            float* inverse) {
  Kind::scales(extremes, n, unit, still, scale, inverse);
}
}
