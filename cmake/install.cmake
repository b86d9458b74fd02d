# The installed package: headers, the static library, and what find_package(deltafox) needs.
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/deltafox)
install(DIRECTORY include/deltafox TYPE INCLUDE)
install(TARGETS deltafox EXPORT deltafox-targets)
install(EXPORT deltafox-targets NAMESPACE deltafox:: DESTINATION ${package_dir})

configure_package_config_file(cmake/deltafox-config.cmake.in
  ${CMAKE_CURRENT_BINARY_DIR}/deltafox-config.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/deltafox-config-version.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES
  ${CMAKE_CURRENT_BINARY_DIR}/deltafox-config.cmake
  ${CMAKE_CURRENT_BINARY_DIR}/deltafox-config-version.cmake
  DESTINATION ${package_dir})
