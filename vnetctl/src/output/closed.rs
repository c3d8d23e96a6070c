//! Whether standard output was closed when this program was started, as by `>&-`.
//!
//! The standard library opens `/dev/null` in the place of a standard stream that is closed, so that no file that
//! is opened later gets its number. Data would then be lost and called written. This looks before it does: the
//! loader runs what `.init_array` names before it runs `main` (System V ABI, "Initialization and Termination
//! Functions"; Mach-O has `__mod_init_func` for it).

use std::sync::atomic::{AtomicBool, Ordering};

static STDOUT_IS_CLOSED: AtomicBool = AtomicBool::new(false);

/// Whether it was closed.
pub(crate) fn stdout_is_closed() -> bool {
    STDOUT_IS_CLOSED.load(Ordering::Relaxed)
}

extern "C" fn look() {
    // SAFETY: asks for the flags of a descriptor, and changes nothing.
    let flags = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFD) };
    STDOUT_IS_CLOSED.store(flags == -1, Ordering::Relaxed);
}

// SAFETY: the section holds pointers to functions without arguments that are called once, by one thread. This one
// calls fcntl and stores to an atomic: neither needs anything of the library that is not set up yet.
#[used]
#[cfg_attr(not(target_vendor = "apple"), unsafe(link_section = ".init_array"))]
#[cfg_attr(target_vendor = "apple", unsafe(link_section = "__DATA,__mod_init_func"))]
static LOOK: extern "C" fn() = look;
