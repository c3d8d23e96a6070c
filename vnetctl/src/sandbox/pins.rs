//! Keeping what is hidden or read-only where it is: a mount covers a directory, and the directory above it can
//! still be renamed by whoever may write there, so that another takes its place, also outside.
//!
//! ```text
//! ~/.local/state/vnet   covered by an empty directory
//! $ mv ~/.local ~/.old; mkdir -p ~/.local/state/vnet     the next vnetctl's state, as the command likes it
//! ```
//!
//! What something is mounted on can be neither renamed nor removed in that mount namespace, nor in a later copy
//! of it (`EBUSY`). So every directory and every symbolic link on the way to such a place, whose own parent the
//! command may write to, is mounted on itself. It stays as writable as it was; a rename from one side of such a
//! mount to the other says `EXDEV`, and mv(1) copies.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsString;
use std::fs;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::{AccessFlags, access};

use super::error::{Failure, Step};
use super::sys;

/// As many symbolic links as the kernel follows on one way.
const LINKS_MAX: usize = 40;
const NONE: Option<&str> = None;

/// Pins the ways to these places. Those that do not exist are left out.
pub(super) fn pin<'a>(places: impl IntoIterator<Item = &'a PathBuf>) -> Result<(), Failure> {
    let mut pinned = BTreeSet::new();
    for place in places {
        if place.exists() {
            pin_way(place, &mut pinned)?;
        }
    }
    Ok(())
}

/// Makes a file read-only, under this name and with the way to it.
pub(super) fn seal(file: &Path) -> Result<(), Failure> {
    let step = || format!("make {} read-only", file.display());
    match mount(Some(file), file, NONE, MsFlags::MS_BIND, NONE) {
        Ok(()) => make_read_only(file).step(step()),
        // Not reachable for the helper, which may do no less than the command.
        Err(Errno::EACCES | Errno::ENOENT) => Ok(()),
        Err(error) => Err(Failure::new(step(), error)),
    }
}

/// Makes the mount at `target` read-only and leaves it otherwise as it is.
fn make_read_only(target: &Path) -> nix::Result<()> {
    let found = statvfs(target)?.flags();
    let mut flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    // What is locked from outside must be repeated.
    for (of_file_system, of_mount) in [
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ] {
        flags.set(of_mount, found.contains(of_file_system));
    }
    mount(NONE, target, NONE, flags, NONE)
}

/// Follows the way as the kernel does, and pins each step.
fn pin_way(place: &Path, pinned: &mut BTreeSet<PathBuf>) -> Result<(), Failure> {
    let mut rest: VecDeque<OsString> = steps(place);
    let mut at = PathBuf::from("/");
    let mut links = 0;
    while let Some(name) = rest.pop_front() {
        if name == ".." {
            at.pop();
            continue;
        }
        let next = at.join(&name);
        // What the caller may not look at, the command may not either.
        let Ok(metadata) = fs::symlink_metadata(&next) else {
            return Ok(());
        };
        let link = metadata.is_symlink();
        let movable = access(&at, AccessFlags::W_OK).is_ok();
        // The place itself is mounted on anyway.
        if movable && (link || !rest.is_empty()) && pinned.insert(next.clone()) {
            let step = || format!("keep {} where it is", next.display());
            match pin_step(&next, link) {
                Ok(()) | Err(Errno::EACCES | Errno::ENOENT) => {}
                Err(error) => return Err(Failure::new(step(), error)),
            }
        }
        if !link {
            at = next;
            continue;
        }
        links += 1;
        if links > LINKS_MAX {
            return Ok(());
        }
        let Ok(target) = fs::read_link(&next) else {
            return Ok(());
        };
        if target.is_absolute() {
            at = PathBuf::from("/");
        }
        let mut way = steps(&target);
        way.append(&mut rest);
        rest = way;
    }
    Ok(())
}

fn pin_step(at: &Path, link: bool) -> nix::Result<()> {
    if link {
        return sys::place_mount(&sys::copy_mount(at, false)?, at);
    }
    mount(Some(at), at, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)
}

fn steps(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter(|component| matches!(component, Component::Normal(_) | Component::ParentDir))
        .map(|component| component.as_os_str().to_owned())
        .collect()
}
