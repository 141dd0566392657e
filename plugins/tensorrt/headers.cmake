# Finds TensorRT's C++ headers, and the CUDA runtime's, which they include. No TensorRT library is linked: the plugins
# find the one that the process has loaded, so that one library serves TensorRT 10.13 and newer, 11, and RTX.
#
# In: KIMI_TENSORRT (AUTO, ON, OFF); TENSORRT_INCLUDE_DIR, or TENSORRT_ROOT as a variable or in the environment; KIMI_PYTHON
# (whose packages may carry the headers).
# Out: TENSORRT_FOUND, TENSORRT_INCLUDE_DIRS.

set(TENSORRT_FOUND FALSE)
if(NOT KIMI_TENSORRT)
  return()
endif()

set(hints)
foreach(root "${TENSORRT_ROOT}" "$ENV{TENSORRT_ROOT}")
  if(root)
    set(folders "${root}/include" "${root}/include/${CMAKE_LIBRARY_ARCHITECTURE}" "${root}")
    # an installation that was asked for is not replaced by other headers in silence
    find_path(in_root NvInferRuntime.h PATHS ${folders} NO_DEFAULT_PATH NO_CACHE)
    if(NOT in_root AND NOT TENSORRT_INCLUDE_DIR)
      message(FATAL_ERROR "TENSORRT_ROOT has no headers; seen: ${root}; expected: NvInferRuntime.h in its folder include; "
                          "give another TENSORRT_ROOT, or -DTENSORRT_INCLUDE_DIR=<folder>, or neither")
    endif()
    unset(in_root)
    list(APPEND hints ${folders})
  endif()
endforeach()
# PyPI's kernel-lens carries the headers of a release; none of its code is used
find_program(KIMI_PYTHON NAMES python3 python)
if(KIMI_PYTHON)
  execute_process(
    COMMAND ${KIMI_PYTHON} -c
            "import importlib.util as u; s = u.find_spec('kernel_lens'); print(*(s.submodule_search_locations if s else ()))"
    OUTPUT_VARIABLE package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(package)
    list(APPEND hints "${package}/include/tensorrt")
  endif()
endif()
find_path(TENSORRT_INCLUDE_DIR NvInferRuntime.h HINTS ${hints} DOC "Folder of TensorRT's headers")

# The open-source headers of a release, each with its hash; base address and list are one choice.
set(KIMI_TENSORRT_HEADERS_URL "https://raw.githubusercontent.com/NVIDIA/TensorRT/v11.1/include"
    CACHE STRING "Where KIMI_TENSORRT=ON downloads headers from")
if(NOT TENSORRT_INCLUDE_DIR AND KIMI_TENSORRT STREQUAL "ON")
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/tensorrt-headers)
  file(STRINGS ${CMAKE_CURRENT_LIST_DIR}/headers.sha256 lines)
  set(downloaded TRUE)
  foreach(line ${lines})
    string(REGEX MATCH "^([0-9a-f]+)  (.+)$" matched "${line}")
    set(hash ${CMAKE_MATCH_1})
    set(name ${CMAKE_MATCH_2})
    if(EXISTS ${folder}/${name})
      file(SHA256 ${folder}/${name} seen)
      if(seen STREQUAL hash)
        continue()
      endif()
    endif()
    file(DOWNLOAD ${KIMI_TENSORRT_HEADERS_URL}/${name} ${folder}/${name}.part TIMEOUT 60 STATUS status)
    list(GET status 0 code)
    if(NOT code EQUAL 0)
      list(GET status 1 reason)
      message(WARNING "${KIMI_TENSORRT_HEADERS_URL}/${name} cannot be downloaded: ${reason}")
      set(downloaded FALSE)
      break()
    endif()
    file(SHA256 ${folder}/${name}.part seen)
    if(NOT seen STREQUAL hash)
      message(FATAL_ERROR "${KIMI_TENSORRT_HEADERS_URL}/${name} is not the pinned file; seen: ${seen}; expected: ${hash}")
    endif()
    file(RENAME ${folder}/${name}.part ${folder}/${name})
  endforeach()
  if(downloaded)
    set(TENSORRT_INCLUDE_DIR ${folder} CACHE PATH "Folder of TensorRT's headers" FORCE)
  endif()
endif()

get_filename_component(nvcc_folder "${KIMI_NVCC}" DIRECTORY)
find_path(KIMI_CUDA_INCLUDE_DIR cuda_runtime_api.h
          HINTS "$ENV{CUDA_HOME}/include" "$ENV{CUDA_PATH}/include" "${nvcc_folder}/../include" /usr/local/cuda/include
          DOC "Folder of the CUDA runtime's headers")

set(missing)
if(NOT TENSORRT_INCLUDE_DIR)
  list(APPEND missing "TensorRT's headers (NvInferRuntime.h)")
else()
  file(STRINGS ${TENSORRT_INCLUDE_DIR}/NvInferVersion.h version_lines REGEX "#define (NV|TRT)_")
  foreach(part MAJOR MINOR)
    # 10 has the number at NV_TENSORRT_<part> or, as 11 does, behind TRT_<part>_ENTERPRISE; RTX behind TRT_<part>_RTX
    string(REGEX MATCH "#define (TRT_${part}_ENTERPRISE|TRT_${part}_RTX|NV_TENSORRT_${part}) +([0-9]+)" matched
                 "${version_lines}")
    set(version_${part} "${CMAKE_MATCH_2}")
  endforeach()
  set(version ${version_MAJOR}.${version_MINOR})
  string(FIND "${version_lines}" "TRT_MAJOR_RTX" rtx)
  if(rtx EQUAL -1 AND version VERSION_LESS 10.13)
    message(FATAL_ERROR "${TENSORRT_INCLUDE_DIR} has the headers of TensorRT ${version}; expected: 10.13 or newer. "
                        "Give another folder with -DTENSORRT_ROOT=<path>, or configure with -DKIMI_TENSORRT=OFF")
  endif()
endif()
if(NOT KIMI_CUDA_INCLUDE_DIR)
  list(APPEND missing "CUDA's headers (cuda_runtime_api.h)")
endif()
if(missing)
  list(JOIN missing " and " missing)
  set(advice
      "The C++ TensorRT plugins are not built, the kernels are: ${missing} not found. Get TensorRT's with "
      "-DTENSORRT_ROOT=<a TensorRT installation>, -DTENSORRT_INCLUDE_DIR=<folder>, or -DKIMI_TENSORRT=ON, which downloads "
      "the open-source ones from GitHub; CUDA's with -DKIMI_CUDA_INCLUDE_DIR=<folder>. The Python plugins need neither.")
  list(JOIN advice "" advice)
  if(KIMI_TENSORRT STREQUAL "ON")
    message(FATAL_ERROR "${advice}")
  endif()
  message(STATUS "${advice}")
else()
  set(TENSORRT_FOUND TRUE)
  set(TENSORRT_INCLUDE_DIRS ${TENSORRT_INCLUDE_DIR} ${KIMI_CUDA_INCLUDE_DIR})
  message(STATUS "TensorRT ${version} headers: ${TENSORRT_INCLUDE_DIR}")
endif()
