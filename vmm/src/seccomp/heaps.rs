//! Keeps the C library from looking at the host when a thread allocates.
#![allow(unsafe_code)] // mallopt(3) has no safe form.

/// Heaps per processor, as many as glibc has by itself.
const PER_PROCESSOR: usize = 8;

/// Sets how many heaps threads share, to what glibc would find out: by opening a file of sysfs, in whatever thread is the ninth to
/// allocate.
pub fn limit() {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let most = i32::try_from(processors.saturating_mul(PER_PROCESSOR)).unwrap_or(i32::MAX);
    // SAFETY: no memory is passed; glibc takes the parameter at any time.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, most) };
}
