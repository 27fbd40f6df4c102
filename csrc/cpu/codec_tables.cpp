#include "cpu/codec_tables.h"

namespace torchao8 {
namespace {

// Vector paths hold 4 * kk (signed) or 2 * kk (unsigned): see vec_*.h.
void build_decode_lines(DecodeLines& t, bool is_signed) {
  const double step = is_signed ? 4 : 2;
  for (int half = 0; half < 16; half += 8) {
    for (int i = 0; i < kDecades; i++) {
      const Line line = decade_line(is_signed, i);
      t.a[half + i + 1] = float(float(line.a) / step);
      t.b[half + i + 1] = float(line.b);
    }
    // Zero and 1.0 share an entry. Signed: kk = 0 and 128. Unsigned: kk = 1 and 256, and
    // 255 * float(1 / 255) rounds to 1.0.
    t.a[half] = is_signed ? float(1.0 / 128 / step) : float(1.0 / 255) / float(step);
    t.b[half] = is_signed ? 0.0f : -float(1.0 / 255);
  }
}

}  // namespace

CodecTables::CodecTables() {
  for (int is_signed = 0; is_signed < 2; is_signed++) {
    for (int code = 0; code < 256; code++) map[is_signed][code] = value_of_code(is_signed, code);
    build_decode_lines(decode[is_signed], is_signed);
    build_nearest_words(nearest[is_signed], is_signed, false, 0);
    build_position_lines(position[is_signed], is_signed);
    if (is_signed) build_nearest_words(nearest[1] + kNegativeCells, true, true, 0);
  }
}

const CodecTables& codec_tables() {
  static const CodecTables tables;
  return tables;
}

}  // namespace torchao8
