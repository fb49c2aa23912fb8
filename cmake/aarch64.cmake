# Cross-builds for 64-bit ARM with GCC, whose OpenMP is the one that torch uses: `make wheel-aarch64`.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
