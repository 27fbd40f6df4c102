// The schemas of the ops that update parameters, find extreme elements, or sum the squares of
// LAMB's updates. Their texts follow from the functions that name an op's arguments: visit_step and
// visit_extremes (op/step_call.h), LambCall::visit_arguments (op/lamb_call.h). The schemas of all
// other ops are written out in register.cpp.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "op/lamb_call.h"
#include "op/step_call.h"

namespace torchao8 {

constexpr const char* kCheck = "check_";  // before an op's name: what only checks its arguments

// Writes the text between the parentheses of a schema.
class SchemaWriter {
 public:
  explicit SchemaWriter(bool only_reads = false) : only_reads_(only_reads) {}
  void list(const std::string& name, const TensorList&, Access access = Access::kRead) {
    add(access == Access::kRead || only_reads_ ? "Tensor[]"
                                               : std::string("Tensor(") + letter_++ + "!)[]",
        name);
  }
  void tensor(const char* name, const std::optional<Tensor>&) { add("Tensor", name); }
  void optional_tensor(const char* name, const std::optional<Tensor>&) { add("Tensor?", name); }
  // The arguments from here on are named in a call.
  void keywords() { separate() += "*"; }
  void flag(const char* name, bool) { add("bool", name); }
  // With the value that they have before they are read as the default.
  void option(const char* name, bool value) { add("bool", name, value ? "True" : "False"); }
  void option(const char* name, int64_t value) { add("int", name, std::to_string(value)); }
  void symbolic_option(const char* name, int64_t value) {
    add("SymInt", name, std::to_string(value));
  }
  void option(const char* name, const std::vector<int64_t>&) { add("int[]", name, "[]"); }

  const std::string& text() const { return text_; }

 private:
  std::string& separate() { return text_ += text_.empty() ? "" : ", "; }
  void add(const std::string& type, const std::string& name, const std::string& otherwise = "") {
    separate() += type + " " + name + (otherwise.empty() ? "" : "=" + otherwise);
  }

  const bool only_reads_;
  std::string text_;
  char letter_ = 'a';
};

template <class Family>
std::string step_schema(bool only_reads = false) {
  StepCall call(step_op<Family>());
  call.set_family(Type<Family>());
  SchemaWriter writer(only_reads);
  visit_step<Family>(writer, call);
  return call.op + ("(" + writer.text() + ") -> ()");
}

template <class Family>
std::string extremes_schema() {
  StepCall call(extremes_op<Family>());
  call.set_family(Type<Family>());
  SchemaWriter writer;
  visit_extremes<Family>(writer, call);
  return call.op + ("(" + writer.text() + ") -> Tensor");
}

inline std::string lamb_schema() {
  LambCall call;
  SchemaWriter writer;
  call.visit_arguments(writer);
  return std::string(kLambOp) + "(" + writer.text() + ") -> Tensor";
}

}  // namespace torchao8
