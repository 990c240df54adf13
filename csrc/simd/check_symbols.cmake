# Fails where an object of csrc/simd/ or csrc/host/simd/ gives the linker anything but its tables of kernels.
#
# cmake -DNM=<nm> -DOBJECTS=<list> -P check_symbols.cmake
#
# The linker keeps one copy of an inline function or an instance of a template. Were it the one of an object compiled
# for AVX-512, every caller would use it, and older processors would stop at an instruction they do not know.
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND "${NM}" --extern-only --defined-only --demangle --format=posix "${object}"
                  OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX REPLACE "\n$" "" symbols "${symbols}")
  string(REPLACE "\n" ";" symbols "${symbols}")
  foreach(symbol IN LISTS symbols)
    if(NOT symbol MATCHES "^llm2clip::[A-Za-z]+Kernels::(portable|avx2|avx512) [DR] ")
      message(FATAL_ERROR "llm2clip: ${object} exports '${symbol}'; sources of simd/ must keep everything but their "
                          "tables of kernels in unnamed namespaces, and call no inline function of a library")
    endif()
  endforeach()
endforeach()
