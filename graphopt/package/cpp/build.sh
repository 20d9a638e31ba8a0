#!/bin/sh
# Builds `run` without CMake. CXX is the compiler, with its flags.
set -eu
cd "$(dirname "$0")"
${CXX:-c++} -std=c++17 -O2 -Iinclude main.cpp -o run -Llib -Wl,--no-as-needed -ltvm_runtime -ltvm_ffi '-Wl,-rpath,$ORIGIN/lib'
