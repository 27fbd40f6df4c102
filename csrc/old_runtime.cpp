// Lets a library that is built with glibc 2.36 and g++ 12 run with glibc 2.28 and the libstdc++ of
// g++ 8: the platform manylinux_2_28, which torch's own wheels have.
//
// The headers of the newer libraries use a few symbols that the older libraries lack. They are
// defined here, and nothing else is: `make release` fails where a compiler uses more of them.

#include <new>
#include <sstream>
#include <string>

#if defined(__GLIBC__) && defined(__GLIBCXX__)

// In glibc since 2.32: not zero while the process has one thread, so that reference counts need no
// atomic operations. Where glibc has it, the dynamic linker takes glibc's. Else this zero is right.
extern "C" {
__attribute__((visibility("default"))) char __libc_single_threaded = 0;
}

#if _GLIBCXX_RELEASE >= 11
// In libstdc++ since g++ 11.
void std::__throw_bad_array_new_length() {
  throw std::bad_array_new_length();
}
#endif

#if _GLIBCXX_RELEASE >= 9 && _GLIBCXX_USE_CXX11_ABI
// In libstdc++ since g++ 9.
template std::stringstream::basic_stringstream();
template std::ostringstream::basic_ostringstream();
#endif

#if _GLIBCXX_RELEASE >= 11 && _GLIBCXX_USE_CXX11_ABI && __cplusplus > 201703L
// In libstdc++ since g++ 11, for C++20.
template std::string std::stringbuf::str() const&;
template std::string std::stringbuf::str() &&;
#endif

// torch's headers from 2.14 on call dlsym, which has the version GLIBC_2.34 since glibc 2.34. The
// linker makes these calls calls of __wrap_dlsym (`--wrap=dlsym` in setup.py), and this one calls
// dlsym by its first version, which all releases of glibc have.
#if defined(__x86_64__) || defined(__aarch64__)
extern "C" {
#if __GLIBC_PREREQ(2, 34)
void* first_dlsym(void* handle, const char* name);
#if defined(__x86_64__)
__asm__(".symver first_dlsym, dlsym@GLIBC_2.2.5");
#else
__asm__(".symver first_dlsym, dlsym@GLIBC_2.17");
#endif
void* __wrap_dlsym(void* handle, const char* name) {
  return first_dlsym(handle, name);
}
#else
void* __real_dlsym(void* handle, const char* name);
void* __wrap_dlsym(void* handle, const char* name) {
  return __real_dlsym(handle, name);
}
#endif
}
#endif

#endif
