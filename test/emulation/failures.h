// How a check tells what differs.
#pragma once

#include <cstdio>
#include <cstdlib>

inline int failures = 0;

// What ends a check's main().
inline int finish() {
  std::printf("%d configurations differ\n", failures);
  std::fflush(stdout);
  return failures != 0;
}

// Prints a line, as printf does. With -DQUICK the first one ends the program: a mutant need not
// differ more often.
template <class... Values>
void fail(const char* format, Values... values) {
  failures++;
  std::printf(format, values...);
#ifdef QUICK
  std::_Exit(finish());
#endif
}
