"""Mutants of the kernels: each breaks one thing that they must do."""

# By a name: the file in csrc/cuda, a text in it, and what takes its place.
MUTANTS = {
    "a skipped block": (
        "fast_block.cuh",
        "for (; unit < end; unit += kWarps) {",
        "for (; unit < end; unit += kWarps) {\n    if (unit % 7 == 3) continue;",
    ),
    "no barrier after copying the tables": (
        "table.cuh",
        "    __syncthreads();\n    uint32_t i = first",
        "    uint32_t i = first",
    ),
    "the rules of the last window": (
        "table.cuh",
        "window[threadIdx.x].set(table.numbers, table.entries[first + threadIdx.x])",
        "window[threadIdx.x].set(table.numbers, table.entries[threadIdx.x])",
    ),
    "factors not read": (
        "table.cuh",
        "if (entry.factors) options.multiply(entry.factors);",
        "",
    ),
    "numbers on the device not read": (
        "table.cuh",
        "if (numbers.rest) set_numbers(options, numbers.rest);",
        "",
    ),
    "found_inf not read": ("step.cuh", "if (table.numbers.found_inf.get() != 0) return;", ""),
    "an approximate root": (
        "device.cuh",
        "return std::fma(std::fma(-s, s, v), r * 0.5f, s);",
        "return s;",
    ),
    "an approximate reciprocal": (
        "device.cuh",
        "return std::fma(std::fma(-x, r, 1.0f), r, r);",
        "return r;",
    ),
    "reciprocals out of their range": (
        "step.cuh",
        "prepared.is_bounded ? entry.fast_units : 0",
        "entry.fast_units",
    ),
    "no way out for a bad block": (
        "fast_block.cuh",
        "if (!scales.finish(rule, look, lanes)) return false;",
        "scales.finish(rule, look, lanes);",
    ),
    "-1.0 not avoided": (
        "formats/dynamic.cuh",
        "codes -= (codes & negative & 0x80808080u) >> 7;",
        "",
    ),
    "a second moment may be zero": (
        "formats/dynamic.cuh",
        "build_nearest_words(t.nearest_unsigned, false, false, kLowestUnsigned);",
        "build_nearest_words(t.nearest_unsigned, false, false, kLowestUnsigned); "
        "t.nearest_unsigned[0] -= 1 << 16;",
    ),
    "the random numbers of the next eight": (
        "fast_block.cuh",
        "random.c0 + random.c2 * eight",
        "random.c0 + random.c2 * (eight + 1)",
    ),
    "the random numbers of the next block": (
        "fast_block.cuh",
        "first_element_of(unit + uint32_t(lane) * kWarps)",
        "first_element_of(unit + uint32_t(lane + 1) * kWarps)",
    ),
    "the parameter rounded by the random numbers of the next eight": (
        "fast_block.cuh",
        "random.from(eight)",
        "random.from(eight + 1)",
    ),
    "the parameter rounded by the random numbers of a state": (
        "table.cuh",
        "uint64_t(step), kParamStream",
        "uint64_t(step), 1",
    ),
    "the parameter of a long block rounded as if it had one span": (
        "fast_block.cuh",
        "of_param, uint32_t(start) / kPerLane);",
        "of_param, uint32_t(lane));",
    ),
    "elements of a shard taken for those of a whole tensor": (
        "table.cuh",
        "return shard_offset + uint64_t(row) * uint64_t(row_stride)",
        "return shard_offset + uint64_t(row) * uint64_t(row_length)",
    ),
    "a row's end inside of four elements": (
        "table.cuh",
        "(row_length == this->count || row_length % kPerThread == 0)",
        "true",
    ),
    "a bad block's parameters rounded to nearest": (
        "slow_block.cuh",
        "at, updated, of_param(i));",
        "at, updated);",
    ),
    "a scale that is not written": (
        "fast_block.cuh",
        "if (lane % lanes == 0) scales.store",
        "if (lane == 32) scales.store",
    ),
    "the sign of the extreme lost": (
        "block.cuh",
        "(low & 0x7fffffffu) > high ? low : high",
        "(low & 0x7fffffffu) > high ? low & 0x7fffffffu : high",
    ),
    "the step not counted": ("count.cuh", "= float(int64_t(*table.steps[i]) + 1);", "+= 0;"),
    "step counts of the first launch in all others": (
        "count.cuh",
        "address_of(first + i)",
        "address_of(i)",
    ),
    "lanes past the end of a short row": (
        "fast_block.cuh",
        "if (eight_of_block > last_eight) eight_of_block = last_eight;",
        "",
    ),
    "lanes past the last block of a row": (
        "fast_block.cuh",
        "if (number > last) number = last;",
        "",
    ),
    "the last span of a long block": (
        "fast_block.cuh",
        "return start < last ? start : last;",
        "return start;",
    ),
    "words at odd addresses": (
        "table.cuh",
        "return reinterpret_cast<uintptr_t>(p) % bytes == 0;",
        "return p != nullptr || bytes;",
    ),
    "the end of a vector": (
        "table.cuh",
        "uint32_t(row_length / unit)",
        "uint32_t(row_length / unit + 1)",
    ),
    "32-bit elements that are not usable": (
        "step.cuh",
        "    if (!good) {\n",
        "    if (!good && false) {\n",
    ),
    "a window that moves and takes its numbers along": (
        "warp_sum.cuh",
        "    flush();\n    const int lowest",
        "    const int lowest",
    ),
    "bits shifted out of the low word": ("warp_sum.cuh", "(square >> 1 >> (63 - shift))", "0"),
    "a carry lost": ("warp_sum.cuh", "+ (low < low_)", ""),
    "a mantissa for zeros": ("warp_sum.cuh", "mantissa = magnitude ?", "mantissa = true ?"),
    "infinite squares": ("warp_sum.cuh", "magnitude != 0 && exponent != 255", "magnitude != 0"),
    "sums read before all warps are done": (
        "sums.cuh",
        "    sum.flush();\n    __syncthreads();",
        "    sum.flush();",
    ),
    "a thread block's last sum in its next": (
        "sums.cuh",
        "      block.limbs[threadIdx.x] = 0;\n    }",
        "    }",
    ),
    "numbers below the window taken for some in it": (
        "warp_sum.cuh",
        " &&\n           smallest_less_1 >= (uint32_t(lowest_) << 23) - 1",
        "",
    ),
    "extremes of the last tensor taken for this one": (
        "one_scale.cuh",
        "    found = Extremes<Rule>();\n",
        "",
    ),
    "the extremes of a warp's last tensor lost": (
        "one_scale.cuh",
        "for_each_unit(table, shared.window, finder);\n  finder.finish();",
        "for_each_unit(table, shared.window, finder);",
    ),
    "extremes of elements that are not usable": (
        "one_scale.cuh",
        "if (all_of_warp(good)) {",
        "if (all_of_warp(good) || true) {",
    ),
    "extremes of the first tensor": (
        "one_scale.cuh",
        "return extreme_of_key<kSigned>(extremes[s]);",
        "return extreme_of_key<kSigned>(extremes[0]);",
    ),
    "reciprocals out of their range, with one scale": (
        "one_scale.cuh",
        "block_size == kSpan && prepared.is_bounded ?",
        "block_size == kSpan ?",
    ),
    "a bad block's parameters rounded to nearest, with one scale": (
        "one_scale.cuh",
        "slow_unit<Format, Rule, kRounds>(entry",
        "slow_unit<Format, Rule, false>(entry",
    ),
    "random numbers of the last tensor taken for this one": (
        "fast_block.cuh",
        "&ahead.of_unit[0][kLanes - 1]",
        "&ahead.of_unit[0][0]",
    ),
    "an extreme element that is too large": (
        "formats/dynamic.cuh",
        "good = good & usable<Rule::kSigned[s]>(extreme[s]) &",
        "good = good &",
    ),
    "a scale that counts as zero": (
        "formats/dynamic.cuh",
        "has_scale = std::fabs(new_scale[s]) >= kMinScale;",
        "has_scale = true;",
    ),
    "the line of a cell for what lies below its start": (
        "formats/dynamic.cuh",
        "cell.template skip_if_below<kBelowStart>(y.x, cell[0].first);",
        "",
    ),
    "scales written though found_inf": (
        "one_scale.cuh",
        "if (i >= table.count || table.numbers.found_inf.get() != 0) return;",
        "if (i >= table.count) return;",
    ),
    "one scale without its unit": ("one_scale.cuh", "prepared.rule.unit[s]);", "1.0f);"),
    "mu-law: a second moment may be zero": (
        "formats/mulaw.cuh",
        "constexpr uint32_t kLeast = !kSigned;",
        "constexpr uint32_t kLeast = 0;",
    ),
    "mu-law: numbers above the last code": (
        "formats/mulaw.cuh",
        "kCodes * kStep<kSigned> - 1;",
        "0x7fff;",
    ),
    "mu-law: signs lost": (
        "formats/mulaw.cuh",
        "and_or(signs_of(x), 0x80808080u,",
        "and_or(signs_of(x), 0,",
    ),
    "mu-law: signs not read": (
        "formats/mulaw.cuh",
        "and_or(word, 0x80008000u, mulaw::",
        "and_or(word, 0, mulaw::",
    ),
    "mu-law: gradients that are NaN": (
        "formats/mulaw.cuh",
        "largest = larger_magnitude(largest, get(i));",
        "largest = larger(largest, std::fabs(get(i)));",
    ),
    "mu-law: the bound of one lane": (
        "formats/mulaw.cuh",
        "mulaw_bounds(rule, param, of_block(l.grad), states, bounds);",
        "mulaw_bounds(rule, param, bits_float(l.grad), states, bounds);",
    ),
    "mu-law: a negative scale": (
        "formats/mulaw.cuh",
        "raise(most, float_bits(scale[s]));",
        "",
    ),
    "mu-law: an approximate quotient": (
        "formats/mulaw.cuh",
        "return 2.0f * fma(fma(Real(-q.x), Real(b), Real(a)), r, q).x;",
        "return 2.0f * q.x;",
    ),
    "mu-law: bounds of gradients that are not usable": (
        "formats/mulaw.cuh",
        "    if (e.good) {\n      param",
        "    {\n      param",
    ),
    "mu-law: no code for a state that is kept": (
        "formats/mulaw.cuh",
        "        if (bad) {",
        "        if (bad && false) {",
    ),
    "mu-law: a state that is kept above all that is usable": (
        "formats/mulaw.cuh",
        "max(kept_value(old[s], scale[s], rule.unit[s]), extremes[s])",
        "max(old[s] * (scale[s] / rule.unit[s]), extremes[s])",
    ),
    "4 bits: codes that wrap": (
        "formats/four_bit.cuh",
        "both_halves(16 * kStep - 1));",
        "both_halves(0x7fff));",
    ),
    "4 bits: a level of -8": (
        "formats/four_bit.cuh",
        "add_and_clamp_halves(levels, added, both_halves(15))",
        "(add_and_clamp_halves(levels, added + both_halves(1), both_halves(16)) - both_halves(1))",
    ),
    "4 bits: the roots of the old scale": (
        "formats/four_bit.cuh",
        "roots(tables, scales.new_scale[kRoot]);",
        "roots(tables, scales.scale[kRoot]);",
    ),
    "4 bits: the roots of the new scale": (
        "formats/four_bit.cuh",
        "roots(tables, scale[kRoot]);",
        "roots(tables, 2.0f * scale[kRoot]);",
    ),
    "4 bits: roots of one parity": (
        "formats/four_bit.cuh",
        "first = ahead & 3;",
        "first = 0;",
    ),
    "4 bits: quotients of another element's root": (
        "formats/four_bit.cuh",
        "roots.reciprocal(codes[kRoot], i)",
        "roots.reciprocal(codes[kRoot], i ^ 1)",
    ),
    "4 bits: the extreme quotient of one lane": (
        "formats/four_bit.cuh",
        "scales.finish_levels(extremes, lanes);",
        "scales.finish_levels(extremes, 1);",
    ),
    "4 bits: the extreme quotient of one span": (
        "fast_block.cuh",
        "elements.add_to(quotients);",
        "if (span == 0) elements.add_to(quotients);",
    ),
    "4 bits: levels beyond -7": (
        "formats/four_bit.cuh",
        "const bool fits = needed <=",
        "const bool fits = true || needed <=",
    ),
    "4 bits: a scale that is not rounded": (
        "formats/four_bit.cuh",
        "fits ? exact : Levels::rounded(exact)",
        "exact",
    ),
    "4 bits: a scale without a sign": (
        "formats/four_bit.cuh",
        "highest >= less_lowest ? magnitude : -magnitude",
        "magnitude",
    ),
    "4 bits: the slow path's levels beyond -7": (
        "formats/four_bit.cuh",
        "lowest = ends.lowest(kLanes);",
        "lowest = highest == 0 ? ends.lowest(kLanes) : 0.0f;",
    ),
    "4 bits: a state that is kept above all that is usable": (
        "formats/four_bit.cuh",
        "return kept_value(old, scale, unit);",
        "return old * (scale / unit);",
    ),
    "4 bits: a negative scale": (
        "formats/four_bit.cuh",
        "good = good & usable<Rule::kSigned[s]>(scale[s]);",
        "",
    ),
    "4 bits: momentum that is not usable": (
        "formats/four_bit.cuh",
        "bool good = l.magnitude < kMostOfLevels;",
        "bool good = true;",
    ),
    "4 bits: a scale that counts as zero": (
        "formats/four_bit.cuh",
        "new_scale[s] = has_scale ? rounded : 0.0f;",
        "new_scale[s] = rounded;",
    ),
    "4 bits: an approximate root": (
        "formats/four_bit.cuh",
        "to.roots[i] = float_bits(FourBitRoots(1.0f).root(i));",
        "to.roots[i] = float_bits(FourBitRoots(1.0f).root(i)) + (i == 9);",
    ),
    "4 bits: the last code of an odd row": (
        "formats/four_bit.cuh",
        "code[s] = FourBitFormat::zero_byte<Rule::kSigned[s]>() & 15;",
        "code[s] = 1;",
    ),
    "4 bits: rows of half bytes": (
        "formats/four_bit.cuh",
        "row * ((entry.row_length + 1) / 2) + column / 2;",
        "(row * entry.row_length + column) / 2;",
    ),
    "4 bits: the slow path's codes not random": (
        "formats/four_bit.cuh",
        "if (stochastic) added = Squares::draw",
        "if (stochastic && false) added = Squares::draw",
    ),
    "4 bits: the slow path's levels not random": (
        "formats/four_bit.cuh",
        "if (stochastic) return Levels::encode",
        "if (stochastic && false) return Levels::encode",
    ),
    "4 bits: levels to nearest": (
        "formats/four_bit.cuh",
        "encode_levels(this->values[s], scales.inverse[s], hash);",
        "encode_levels(this->values[s], scales.inverse[s], nullptr);",
    ),
    "4 bits: random numbers of levels not prepared": (
        "fast_block.cuh",
        "if constexpr (Format::template draws<Rule>(s)) set",
        "if constexpr (Rule::kStochastic[s]) set",
    ),
    "4 bits: codes of a block without a scale that is a number": (
        "formats/four_bit.cuh",
        "if (std::isnan(new_scale[s])) return 0;",
        "",
    ),
    "limbs that are not canonical": ("warp_sum.cuh", "make_canonical(sums + row * kLimbs)", ""),
    "the update of an element that is not usable, in the trust ratio": (
        "lamb.cuh",
        "return good ? rule",
        "return good || true ? rule",
    ),
    "the scale of the first block, in the trust ratio": (
        "lamb.cuh",
        "entry.one_scale ? 0 : block",
        "0",
    ),
    "one scale taken for one of many, in the trust ratio": (
        "lamb.cuh",
        "entry.one_scale ? 0 : block",
        "block",
    ),
    "a tensor's update added to the next one's, in the trust ratio": (
        "lamb.cuh",
        "    finish();\n    row_ = row;",
        "    row_ = row;",
    ),
}
