//! Taking every privilege from the process that becomes the command, and laying the helper's own down for a
//! while: capabilities(7), prctl(2).

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
    set(&[Set::default(); 2])
}

/// Has this thread do without its capabilities until [`take_up`].
///
/// # Errors
/// The kernel refused; none was laid down then.
pub(crate) fn lay_down() -> nix::Result<()> {
    let mut sets = get()?;
    for set in &mut sets {
        set.effective = 0;
    }
    set(&sets)
}

/// Has this thread use again every capability that it may.
///
/// # Errors
/// The kernel refused.
pub(crate) fn take_up() -> nix::Result<()> {
    let mut sets = get()?;
    for set in &mut sets {
        set.effective = set.permitted;
    }
    set(&sets)
}

/// `struct __user_cap_data_struct` of linux/capability.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Set {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// `struct __user_cap_header_struct` of linux/capability.h.
#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// `_LINUX_CAPABILITY_VERSION_3`: two words a set. Of the calling thread.
const OWN: Header = Header {
    version: 0x2008_0522,
    pid: 0,
};

fn get() -> nix::Result<[Set; 2]> {
    let mut header = OWN;
    let mut sets = [Set::default(); 2];
    // SAFETY: both point to live values of the layout that version 3 defines.
    Errno::result(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) })?;
    Ok(sets)
}

fn set(sets: &[Set; 2]) -> nix::Result<()> {
    let mut header = OWN;
    // SAFETY: both point to live values of the layout that version 3 defines; the sets are only read.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) }).map(drop)
}

/// prctl(2) with one argument.
fn prctl(option: libc::c_int, argument: libc::c_ulong) -> nix::Result<()> {
    const NONE: libc::c_ulong = 0;
    // SAFETY: the options used in this file take numbers only.
    Errno::result(unsafe { libc::prctl(option, argument, NONE, NONE, NONE) }).map(drop)
}
