// Python's lock (the GIL), which an op runs without.
#pragma once

namespace torchao8 {

// Holds it as long as it lives. Without an interpreter, does nothing.
class InterpreterLock {
 public:
  InterpreterLock();
  ~InterpreterLock();
  InterpreterLock(const InterpreterLock&) = delete;

 private:
  int state_ = -1;
};

}  // namespace torchao8
