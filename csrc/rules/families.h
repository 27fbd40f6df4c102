// Every family of update rules. This is the one list of them: schemas, the CPU's kernels and their
// registration, the names that Python reads, and the checks of the CUDA kernels follow from it. The
// CUDA kernels of each rule need a file of their own as well, such as cuda/rules/lion.cu.
#pragma once

#include "rules/adagrad.h"
#include "rules/adam.h"
#include "rules/ademamix.h"
#include "rules/lion.h"
#include "rules/muon.h"
#include "rules/nadam.h"
#include "rules/rmsprop.h"
#include "rules/sgd.h"

namespace torchao8 {

using Families = Types<AdagradFamily, AdamFamily, AdemamixFamily, LionFamily, MuonFamily,
                       NadamFamily, RmspropFamily, SgdFamily>;

// Calls f(Type<T>()) for each type of a list, in its order.
template <class... T, class Function>
void for_each_type(Types<T...>, Function f) {
  (f(Type<T>()), ...);
}

// The rules of all families, in one list.
template <class... Lists>
struct Joined;
template <class... T>
struct Joined<Types<T...>> {
  using type = Types<T...>;
};
template <class... A, class... B, class... Rest>
struct Joined<Types<A...>, Types<B...>, Rest...> : Joined<Types<A..., B...>, Rest...> {};
template <class List>
struct RulesOf;
template <class... Family>
struct RulesOf<Types<Family...>> : Joined<typename Family::Rules...> {};
using AllRules = RulesOf<Families>::type;

}  // namespace torchao8
