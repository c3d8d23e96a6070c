//! Where a user's sockets and state live: written once, for the controlplane and for vnetctl.
//!
//! Sockets: `$XDG_RUNTIME_DIR/vnet` (XDG Base Directory Specification), else `/run/user/UID/vnet`
//! where the system made that directory, else a directory of the user's own under the temporary
//! directory. Each must belong to the user and to nobody else. State: `$XDG_STATE_HOME/vnet`, else
//! `~/.local/state/vnet`. Where no HOME is set, as in a service of the system's, it is what the account says.

use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

/// File name of the API's socket in the runtime directory.
pub const CONTROL_SOCKET: &str = "control.sock";
/// File name of the session's socket in the runtime directory.
pub const SESSION_SOCKET: &str = "session.sock";
/// File name of the state in the state directory.
pub const STATE_FILE: &str = "state.db";
/// The longest path that a Unix socket address takes, its closing zero aside (unix(7)).
pub const SOCKET_PATH_BYTES_MAX: usize = if cfg!(target_os = "linux") { 107 } else { 103 };

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// Something else than a directory is there (a link is not followed).
    #[error("{} is not a directory; remove it, or listen elsewhere", .0.display())]
    NotDirectory(PathBuf),
    /// It belongs to somebody else.
    #[error("{} belongs to uid {owner}, not to uid {wanted}; listen elsewhere", .path.display())]
    Owner {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Whose it should be.
        wanted: u32,
    },
    /// Others may enter it.
    #[error("{} has mode {mode:04o}, so others may enter it; run: chmod 700 {}", .path.display(), .path.display())]
    Mode {
        /// The directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It cannot be made or looked at.
    #[error("directory {} cannot be used", .path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A path is too long for a socket.
    #[error("socket path {} is {} bytes long (at most {SOCKET_PATH_BYTES_MAX}); choose a shorter one",
        .0.display(), .0.as_os_str().len())]
    TooLong(PathBuf),
    /// Neither XDG_STATE_HOME nor HOME is set, and the user has no account here.
    #[error(
        "there is no place for state: neither XDG_STATE_HOME nor HOME is set to an absolute path, and this user has \
         no home directory; set one of them"
    )]
    NoHome,
}

/// The API's socket of this user. Nothing is made or checked.
pub fn control_socket() -> PathBuf {
    runtime_dir().join(CONTROL_SOCKET)
}

/// The session's socket of this user. Nothing is made or checked.
pub fn session_socket() -> PathBuf {
    runtime_dir().join(SESSION_SOCKET)
}

/// The directory for this user's sockets. Nothing is made or checked: see [`ensure_private_dir`].
pub fn runtime_dir() -> PathBuf {
    let uid = nix::unistd::geteuid().as_raw();
    let xdg = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let user_run = PathBuf::from(format!("/run/user/{uid}"));
    let user_run_fits = is_private_dir(&user_run, uid);
    let temporary = if cfg!(target_os = "macos") {
        std::env::temp_dir()
    } else {
        PathBuf::from("/tmp")
    };
    choose_runtime_dir(xdg, user_run_fits.then_some(user_run), &temporary, uid)
}

fn choose_runtime_dir(
    xdg: Option<PathBuf>,
    user_run: Option<PathBuf>,
    temporary: &Path,
    uid: u32,
) -> PathBuf {
    let fits = |dir: &PathBuf| dir.join(SESSION_SOCKET).as_os_str().len() <= SOCKET_PATH_BYTES_MAX;
    xdg.filter(|dir| dir.is_absolute())
        .or(user_run)
        .map(|dir| dir.join("vnet"))
        .filter(fits)
        .unwrap_or_else(|| temporary.join(format!("vnet-{uid}")))
}

/// The directory for this user's state. Nothing is made.
///
/// # Errors
/// [`PathError::NoHome`].
pub fn state_dir() -> Result<PathBuf, PathError> {
    let variable = |name: &str| std::env::var_os(name);
    absolute(variable, "XDG_STATE_HOME")
        .or_else(|| home_dir(nix::unistd::geteuid().as_raw(), variable).map(|home| home.join(".local/state")))
        .map(|dir| dir.join("vnet"))
        .ok_or(PathError::NoHome)
}

/// A user's home directory: `HOME`, else what the account says.
pub fn home_dir(uid: u32, variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    absolute(variable, "HOME").or_else(|| {
        let account = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid));
        Some(account.ok()??.dir).filter(|home| home.is_absolute())
    })
}

/// A variable that names a place. What is no absolute path counts as unset (XDG Base Directory Specification).
pub fn absolute(variable: impl Fn(&str) -> Option<OsString>, name: &str) -> Option<PathBuf> {
    variable(name)
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
}

/// Makes a directory that only this user may enter, or checks that an existing one is such.
///
/// # Errors
/// [`PathError`] if it is a link, belongs to somebody else, or lets others in.
pub fn ensure_private_dir(path: &Path) -> Result<(), PathError> {
    let io = |source| PathError::Io {
        path: path.to_owned(),
        source,
    };
    if let Some(parent) = path.parent()
        && !parent.exists()
    {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)
            .map_err(io)?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(io(e)),
    }
    let found = fs::symlink_metadata(path).map_err(io)?;
    let wanted = nix::unistd::geteuid().as_raw();
    if !found.is_dir() {
        Err(PathError::NotDirectory(path.to_owned()))
    } else if found.uid() != wanted {
        Err(PathError::Owner {
            path: path.to_owned(),
            owner: found.uid(),
            wanted,
        })
    } else if found.mode() & 0o077 != 0 {
        Err(PathError::Mode {
            path: path.to_owned(),
            mode: found.mode() & 0o7777,
        })
    } else {
        Ok(())
    }
}

/// Checks that a path fits into a socket address.
///
/// # Errors
/// [`PathError::TooLong`].
pub fn check_socket_path(path: &Path) -> Result<(), PathError> {
    if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
        return Err(PathError::TooLong(path.to_owned()));
    }
    Ok(())
}

fn is_private_dir(path: &Path, uid: u32) -> bool {
    fs::symlink_metadata(path).is_ok_and(|m| m.is_dir() && m.uid() == uid && m.mode() & 0o077 == 0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::testing::TempDir;

    #[test]
    fn runtime_dir_prefers_xdg_then_the_systems_then_the_users_own() {
        let tmp = Path::new("/tmp");
        let run = || Some(PathBuf::from("/run/user/7"));
        let choose =
            |xdg: Option<&str>, user_run| choose_runtime_dir(xdg.map(PathBuf::from), user_run, tmp, 7);
        assert_eq!(choose(Some("/run/x"), run()), Path::new("/run/x/vnet"));
        assert_eq!(choose(Some("relative"), run()), Path::new("/run/user/7/vnet"));
        assert_eq!(choose(None, run()), Path::new("/run/user/7/vnet"));
        assert_eq!(choose(None, None), Path::new("/tmp/vnet-7"));
        let long = format!("/{}", "x".repeat(120));
        assert_eq!(choose(Some(&long), None), Path::new("/tmp/vnet-7"));
    }

    #[test]
    fn a_directory_that_others_may_enter_is_refused() {
        let dir = TempDir::new();
        let inner = dir.path().join("a/b");
        ensure_private_dir(&inner).unwrap();
        ensure_private_dir(&inner).unwrap();
        fs::set_permissions(&inner, fs::Permissions::from_mode(0o750)).unwrap();
        assert!(matches!(
            ensure_private_dir(&inner),
            Err(PathError::Mode { mode: 0o750, .. })
        ));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&inner, &link).unwrap();
        assert!(matches!(
            ensure_private_dir(&link),
            Err(PathError::NotDirectory(_))
        ));
    }

    #[test]
    fn a_socket_path_that_is_too_long_is_refused() {
        assert!(check_socket_path(Path::new("/tmp/x.sock")).is_ok());
        let long = PathBuf::from(format!("/{}", "x".repeat(SOCKET_PATH_BYTES_MAX)));
        assert!(matches!(check_socket_path(&long), Err(PathError::TooLong(_))));
    }
}
