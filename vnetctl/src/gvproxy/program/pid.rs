//! The file of `-pid-file`: this process's id in digits, without a line's end, as gvproxy writes it. Removed at the
//! end, also at one by an error, if it is still this process's.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

/// The file, for as long as this lives.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    text: String,
    /// Whether a file was made, to be removed at the end; a pipe or a device stays.
    is_made: bool,
}

impl PidFile {
    /// Writes it. One that is there is replaced: it is of a process that ended otherwise. So is a link,
    /// whoever made it, and nothing is written where it leads, be that a file, a pipe or a device. What is
    /// neither a link nor a file is written to.
    ///
    /// # Errors
    /// A link of the system's, which would be gone for everybody; a pipe that nobody reads; else the
    /// system's.
    pub fn write(path: PathBuf) -> io::Result<Self> {
        let text = std::process::id().to_string();
        let found = fs::symlink_metadata(&path);
        let is_made = match found.map(|found| found.file_type()) {
            Ok(kind) if kind.is_symlink() && is_of_the_system(&path)? => {
                let text = "it is a link below /dev or /proc, which is the system's (name a file)";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
            Ok(kind) => kind.is_file() || kind.is_symlink(),
            // Also where it cannot be told: that error comes again.
            Err(_) => true,
        };
        if is_made {
            replace(&path, text.as_bytes())?;
        } else {
            // A pipe without a reader would be waited for, and no signal heard meanwhile.
            let flags = OFlag::O_NOFOLLOW | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
            let opened = fs::File::options()
                .write(true)
                .custom_flags(flags.bits())
                .open(&path);
            opened.map_err(of_a_pipe)?.write_all(text.as_bytes())?;
        }
        Ok(Self { path, text, is_made })
    }
}

/// What is said of a pipe that nobody reads (open(2), ENXIO).
pub(super) fn of_a_pipe(error: io::Error) -> io::Error {
    if error.raw_os_error() == Some(libc::ENXIO) {
        let text = "it is a pipe that nobody reads, or a socket (start its reader first, or name a file)";
        return io::Error::new(io::ErrorKind::NotConnected, text);
    }
    error
}

/// Whether a link lies where the system keeps its own, as `/dev/stdout`, by whatever way the path leads there.
fn is_of_the_system(path: &Path) -> io::Result<bool> {
    let directory = path
        .parent()
        .filter(|directory| !directory.as_os_str().is_empty());
    let directory = fs::canonicalize(directory.unwrap_or(Path::new(".")))?;
    Ok(["/dev", "/proc"]
        .iter()
        .any(|of_system| directory.starts_with(of_system)))
}

/// Puts a file in the place of whatever is there, whole from its first moment.
fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    // So that nobody has made one of its name before.
    let random = getrandom::u64().map_err(|error| io::Error::other(error.to_string()))?;
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().ok_or(io::ErrorKind::InvalidInput)?);
    name.push(format!(".{random:016x}"));
    let beside = path.with_file_name(name);
    let mut file = fs::File::options()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(&beside)?;
    let written = file.write_all(text).and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // Looked at before it is read: what came in its place meanwhile may be a pipe, or long.
        let may_be_ours = |found: fs::Metadata| found.is_file() && found.len() == self.text.len() as u64;
        // Another that was started meanwhile keeps its own.
        if self.is_made
            && fs::symlink_metadata(&self.path).is_ok_and(may_be_ours)
            && fs::read(&self.path).is_ok_and(|found| found == self.text.as_bytes())
        {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _, symlink};

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;

    fn is_fifo(path: &Path) -> bool {
        fs::symlink_metadata(path).unwrap().file_type().is_fifo()
    }

    #[test]
    fn it_holds_the_digits_alone_and_goes_with_its_process_only() {
        let path = std::env::temp_dir().join(format!("vnetctl-pid-{}", std::process::id()));
        fs::write(&path, "1\n").unwrap();

        let file = PidFile::write(path.clone()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), std::process::id().to_string());
        drop(file);
        assert!(!path.exists());

        let file = PidFile::write(path.clone()).unwrap();
        fs::write(&path, "another").unwrap();
        drop(file);
        assert_eq!(fs::read_to_string(&path).unwrap(), "another");
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_link_is_replaced_and_nothing_is_written_where_it_leads() {
        let directory = std::env::temp_dir().join(format!("vnetctl-pid-link-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        let [path, target] = ["gv.pid", "target"].map(|name| directory.join(name));
        fs::write(&target, "precious").unwrap();
        for leads_to in [&target, &directory.join("nothing")] {
            symlink(leads_to, &path).unwrap();
            let file = PidFile::write(path.clone()).unwrap();
            let found = fs::symlink_metadata(&path).unwrap();
            assert!(found.is_file(), "{found:?}");
            assert_eq!(found.permissions().mode() & 0o777, 0o644);
            drop(file);
            assert_eq!(fs::read_to_string(&target).unwrap(), "precious");
            let left: Vec<_> = fs::read_dir(&directory)
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
                .collect();
            assert_eq!(left, ["target"]);
        }
        // Nobody reads it: to write there would be to wait without end.
        let fifo = directory.join("fifo");
        mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        symlink(&fifo, &path).unwrap();
        let file = PidFile::write(path.clone()).unwrap();
        assert!(fs::symlink_metadata(&path).unwrap().is_file());
        drop(file);
        assert!(!path.exists() && is_fifo(&fifo));
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn what_is_neither_a_link_nor_a_file_is_written_to_and_stays_what_it_is() {
        let fifo = std::env::temp_dir().join(format!("vnetctl-pid-fifo-{}", std::process::id()));
        mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        // Nobody reads it.
        let refused = PidFile::write(fifo.clone()).unwrap_err().to_string();
        assert!(refused.starts_with("it is a pipe that nobody reads"), "{refused}");
        let mut reader = fs::File::options()
            .read(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(&fifo)
            .unwrap();
        let file = PidFile::write(fifo.clone()).unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, std::process::id().to_string());
        drop(file);
        assert!(is_fifo(&fifo));
        fs::remove_file(&fifo).unwrap();
        let file = PidFile::write("/dev/null".into()).unwrap();
        drop(file);
        assert!(!fs::symlink_metadata("/dev/null").unwrap().is_file());
    }

    /// Else root would replace it, and remove it at the end.
    #[test]
    fn a_link_of_the_systems_is_refused_however_it_is_named() {
        let directory = std::env::temp_dir().join(format!("vnetctl-pid-dev-{}", std::process::id()));
        symlink("/dev", &directory).unwrap();
        for path in ["/dev/stdout".into(), directory.join("stdout")] {
            let refused = PidFile::write(path.clone()).unwrap_err().to_string();
            assert_eq!(
                refused, "it is a link below /dev or /proc, which is the system's (name a file)",
                "{path:?}"
            );
        }
        assert!(fs::symlink_metadata("/dev/stdout").unwrap().is_symlink());
        fs::remove_file(&directory).unwrap();
    }

    #[test]
    fn what_came_in_its_place_is_left_and_not_waited_for() {
        let path = std::env::temp_dir().join(format!("vnetctl-pid-place-{}", std::process::id()));
        let file = PidFile::write(path.clone()).unwrap();
        fs::remove_file(&path).unwrap();
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        drop(file);
        assert!(is_fifo(&path));
        fs::remove_file(&path).unwrap();
    }
}
