// Two names that newer compilers use and older Linux systems lack. With copies of its own a library needs glibc 2.14 and the
// C++ library of GCC 5, wherever it was built.
#include <new>

#define MULTIFIRE_HIDDEN __attribute__((visibility("hidden")))

// glibc 2.32: not 0 where the process has one thread, so that std::shared_ptr may count without atomic operations.
extern "C" {
extern MULTIFIRE_HIDDEN char __libc_single_threaded;
char __libc_single_threaded = 0;
}

// GCC 11: what std::vector throws for a size that no memory could hold.
namespace std {
[[noreturn]] MULTIFIRE_HIDDEN void __throw_bad_array_new_length() { throw bad_alloc(); }
}  // namespace std
