//! `--write`: where a command may write when all else is read-only.
//!
//! Every mount of the run is made read-only, and copies of the places that stay writable, taken before, are laid
//! over them. `/tmp`, `/var/tmp` and `/dev/shm` are empty directories of the run's own, as nearly every program
//! needs one; the places named below them, and the directory that the command starts in, are shown in them.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use super::error::{Failure, Step};
use super::sys;

/// Replaced by directories of the run's own.
const TEMPORARY: [&str; 3] = ["/tmp", "/var/tmp", "/dev/shm"];

/// Makes all read-only but these; to be done when everything else is mounted, `/proc` and terminals aside.
/// The paths are real ones.
pub(super) fn restrict(writable: &[PathBuf], cwd: Option<&Path>) -> Result<(), Failure> {
    let mut kept: Vec<(PathBuf, OwnedFd)> = Vec::new();
    for path in outermost(writable) {
        let step = format!("keep {} writable", path.display());
        // What may not be reached is not written to either; but the user should know.
        kept.push((path.clone(), sys::copy_mount(path, true).step(step)?));
    }
    sys::set_read_only_everywhere().map_err(|errno| Failure {
        step: "make the file system read-only".into(),
        cause: errno.desc().into(),
        remedy: (errno == Errno::ENOSYS).then(|| "--write needs Linux 5.12 or later".into()),
    })?;
    let temporary: Vec<&Path> = TEMPORARY
        .iter()
        .map(Path::new)
        .filter(|path| {
            // Nothing is to be there twice, and a link to another is covered with it.
            fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir())
                && !writable.iter().any(|kept| path.starts_with(kept))
        })
        .collect();
    if let Some(cwd) = cwd
        && temporary.iter().any(|path| cwd.starts_with(path) && cwd != *path)
        && !kept.iter().any(|(path, _)| cwd.starts_with(path))
    {
        let step = format!("show {}", cwd.display());
        // First, so that what is writable below it lies above it.
        kept.insert(0, (cwd.to_owned(), sys::copy_mount(cwd, true).step(step)?));
    }
    for path in &temporary {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("tmpfs"), *path, Some("tmpfs"), flags, Some("mode=1777"))
            .step(format!("give the run a {} of its own", path.display()))?;
    }
    for (path, tree) in &kept {
        let step = || format!("keep {} writable", path.display());
        if temporary.iter().any(|directory| path.starts_with(directory)) {
            make_place(path, tree).step(step())?;
        }
        sys::place_mount(tree, path).step(step())?;
    }
    Ok(())
}

/// Those that are not below another, sorted.
fn outermost(paths: &[PathBuf]) -> Vec<&PathBuf> {
    let mut sorted: Vec<&PathBuf> = paths.iter().collect();
    sorted.sort();
    let mut outer: Vec<&PathBuf> = Vec::new();
    for path in sorted {
        if !outer.iter().any(|other| path.starts_with(other)) {
            outer.push(path);
        }
    }
    outer
}

/// Makes a place for it, if there is none: a directory or a file, and what leads there.
fn make_place(path: &Path, tree: &OwnedFd) -> std::io::Result<()> {
    if fs::symlink_metadata(path).is_ok() {
        return Ok(());
    }
    let mut directories = fs::DirBuilder::new();
    directories.recursive(true).mode(0o755);
    let kind = nix::sys::stat::fstat(tree)?.st_mode & libc::S_IFMT;
    if kind == libc::S_IFDIR {
        return directories.create(path);
    }
    if let Some(parent) = path.parent() {
        directories.create(parent)?;
    }
    fs::File::create_new(path).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_below_others_are_kept_with_them() {
        let paths = ["/w/a/b", "/w/a", "/w/ab", "/w/a"].map(PathBuf::from);
        let outer: Vec<_> = outermost(&paths)
            .into_iter()
            .map(|path| path.to_str().unwrap())
            .collect();
        assert_eq!(outer, ["/w/a", "/w/ab"]);
    }
}
