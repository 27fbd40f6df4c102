// What the kernels ask of a format of 8-bit state. formats/NAME.cuh has it for each format, as
// specializations of these templates.
#pragma once

#include "cuda/block.cuh"
#include "formats/formats.h"

namespace torchao8::cuda {

// The formats that there are kernels of.
using Formats = Types<DynamicFormat, MulawFormat, FourBitFormat>;

// The codec of a format. It has
//     Tables          what a thread block keeps in shared memory; an empty class where there is
//                     nothing to keep
//     copy_tables(to, from)   into shared memory, before a barrier
//     scale(stored)   a stored scale as steps take it
//     kept(old, scale, unit)   a stored number in units, where a step leaves the state as it is
//     decode<kSigned>(tables, code)            a number, as a multiple of its block's scale
//     decode_four<kSigned>(tables, word, to)   the same of the bytes of a word
//     encode_eight_nearest<kSigned>(tables, x, encoding)             the codes of eight numbers, in
//     encode_eight_stochastic<kSigned>(tables, x, encoding, hash)    units, as bytes of two words.
//                     These are of blocks that the fast path takes: all numbers are usable
template <class Format>
struct CodecOf;

template <class Format>
using TablesOf = typename CodecOf<Format>::Tables;

// What the fast path must know of a block before it writes anything. It has
//     kLooksAgain     whether a long block is looked at a second time, when its random numbers are
//                     known. Its elements then have find_quotients(), which encodes some states and
//                     prepares the others, and finish_levels() finds the scales of those
//     Look            what a lane finds in its elements; look(rule, elements, tables) looks at
//                     eight of them, add_all_of(other) adds them to others. A look leaves in
//                     elements.values the new values (kLooksAtMoments), or the decoded ones
//     scale[s]        of the old states, as stored; load(entry, at) sets them
//     finish(rule, look, lanes)   whether the fast path can take all elements of the block. So many
//                     lanes share the block
//     encoding(s)     as encode_eight takes it, of a state
//     store(at)       writes the new scales, but for one scale of a tensor
template <class Format, class Rule, class Entry>
struct FastScales;

// An element as the slow path sees it: the new values, or, where they are not usable, the states as
// they are.
template <class Rule>
struct SlowElement {
  float old[Rule::kStates], values[Rule::kValues], param, grad;
  bool good;
};

// The same of the slow path, of any block. It has
//     add(element)    of a lane; not called where a tensor has one scale
//     finish(rule, scale, entry)
//     encode_nearest(s, tables, x), encode_stochastic(s, tables, x, hash)    the code of a number
//     store(entry, block)
template <class Format, class Rule, class Entry>
struct SlowScales;

}  // namespace torchao8::cuda
