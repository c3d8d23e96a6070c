//! Taking every privilege from the process that becomes the command: capabilities(7), prctl(2).

use nix::errno::Errno;

/// Empties all five capability sets and makes sure that no program can fill one again.
///
/// # Errors
/// The first call that failed; the process must then not become the command.
pub(crate) fn drop_all() -> nix::Result<()> {
    // The kernel says EINVAL for the first number that it does not know.
    for capability in 0..=libc::c_ulong::from(u8::MAX) {
        match prctl(libc::PR_CAPBSET_DROP, capability) {
            Ok(()) => {}
            Err(Errno::EINVAL) => break,
            Err(error) => return Err(error),
        }
    }
    prctl(
        libc::PR_CAP_AMBIENT,
        libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong,
    )?;
    nix::sys::prctl::set_no_new_privs()?;
    clear_sets()
}

/// Empties the effective, permitted and inheritable sets, and with them what the ambient set may hold.
fn clear_sets() -> nix::Result<()> {
    /// `struct __user_cap_header_struct` of linux/capability.h.
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    /// `_LINUX_CAPABILITY_VERSION_3`: two words a set.
    const VERSION_3: u32 = 0x2008_0522;
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let sets = [0u32; 6];
    // SAFETY: both point to live values of the layout that version 3 defines; the kernel only reads them.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) }).map(drop)
}

/// prctl(2) with one argument.
fn prctl(option: libc::c_int, argument: libc::c_ulong) -> nix::Result<()> {
    const NONE: libc::c_ulong = 0;
    // SAFETY: the options used in this file take numbers only.
    Errno::result(unsafe { libc::prctl(option, argument, NONE, NONE, NONE) }).map(drop)
}
