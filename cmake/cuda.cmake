# The CUDA back end, src/cuda without its stubs. It needs the toolkit to build and only the driver
# and cuBLASLt to run; the CUDA runtime is linked statically.
find_program(NVCC nvcc HINTS /usr/local/cuda/bin ENV CUDA_HOME PATH_SUFFIXES bin REQUIRED)
set(CMAKE_CUDA_COMPILER ${NVCC})
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real)
endif()
if(CCACHE)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE})
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
# CMake 3.25 does not know how nvcc 12 and newer are asked for C++20.
set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")

file(GLOB cuda_sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/src/cuda/*.cu
     ${CMAKE_CURRENT_SOURCE_DIR}/src/cuda/*.cc)
add_library(deltafox_cuda OBJECT ${cuda_sources})
# Its weights of tokens are the CPU's, to the bit.
set_source_files_properties(src/cuda/choose_token.cu PROPERTIES COMPILE_OPTIONS --fmad=false)
target_include_directories(deltafox_cuda PRIVATE src include)
target_compile_options(deltafox_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow>
  # 177: what one architecture leaves unused, another uses.
  $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr --extended-lambda -lineinfo -diag-suppress=177
    -Xcompiler=-Wall -Xcompiler=-Wextra>)
if(DELTAFOX_WERROR)
  target_compile_options(deltafox_cuda PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Werror> $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
endif()
target_link_libraries(deltafox_cuda PRIVATE fmt::fmt CUDA::toolkit)
target_sources(deltafox PRIVATE $<TARGET_OBJECTS:deltafox_cuda>)
# Nothing else sees the toolkit's headers.
set_target_properties(CUDA::cudart_static CUDA::cublasLt PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "")
target_link_libraries(deltafox PUBLIC
  $<BUILD_INTERFACE:CUDA::cudart_static> $<BUILD_INTERFACE:CUDA::cublasLt>)
