# libkimi_ort.so: the CPU kernels of ../cpu, each for several instruction sets, and ONNX Runtime's custom ops over them.
# No header of ONNX Runtime is needed; with ONNXRUNTIME_INCLUDE_DIR ours is compared with it.
set(kernels kda latent_attention moe tokenwise)
set(ops kda latent_attention library mixture_of_experts op tokenwise)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(levels x86_64_v2 x86_64_v3 x86_64_v4 x86_64_v4_vnni)
else()
  set(levels native)
endif()

list(TRANSFORM ops REPLACE "(.+)" "onnxruntime/\\1.cpp" OUTPUT_VARIABLE op_sources)
add_library(kimi_ort SHARED cpu/dispatch.cpp ${op_sources})
target_compile_options(kimi_ort PRIVATE -O2 ${KIMI_WARNINGS})
foreach(level ${levels})
  # products of bytes are of quantised weights only
  if(level MATCHES "vnni")
    set(level_kernels moe tokenwise)
  else()
    set(level_kernels ${kernels})
  endif()
  list(TRANSFORM level_kernels REPLACE "(.+)" "cpu/\\1.cpp" OUTPUT_VARIABLE kernel_sources)
  add_library(cpu_${level} OBJECT ${kernel_sources})
  target_compile_definitions(cpu_${level} PRIVATE KIMI_CPU_LEVEL=${level})
  # errno and traps of floating-point arithmetic keep loops from being vectorised; nobody reads them. Results of NaN and
  # infinity stay what they are.
  target_compile_options(cpu_${level} PRIVATE -O3 -fopenmp-simd -fno-math-errno -fno-trapping-math -ffp-contract=fast
                                              ${KIMI_WARNINGS} -Wno-psabi -Wno-pass-failed)
  if(NOT level STREQUAL "native")
    string(REPLACE "x86_64_" "x86-64-" architecture ${level})
    string(REPLACE "_vnni" ";-mavx512vnni" architecture ${architecture})
    target_compile_options(cpu_${level} PRIVATE -march=${architecture} -mprefer-vector-width=512)
  endif()
  target_sources(kimi_ort PRIVATE $<TARGET_OBJECTS:cpu_${level}>)
endforeach()

if(ONNXRUNTIME_INCLUDE_DIR)
  add_library(ort_abi_layout OBJECT tests/ort_abi_layout.cpp)
  target_include_directories(ort_abi_layout SYSTEM PRIVATE ${ONNXRUNTIME_INCLUDE_DIR})
endif()
