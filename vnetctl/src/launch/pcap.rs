//! The file of `--pcap`: opened here, with the user's rights and by the path as typed, and inherited by the dataplane.

use std::fs::File;
use std::io::{self, IsTerminal as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::failure::how_to_write;

/// Why a capture's file cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PcapError {
    /// The system refuses it.
    #[error("cannot be opened: {}{}", .0, how_to_write(.0))]
    Open(#[source] io::Error),
    /// It is a link, and there is nothing where it leads.
    #[error(
        "is a link that leads to nothing, and nothing is made where a link leads (remove it, or make what it leads to)"
    )]
    Dangling,
    /// It is a terminal.
    #[error("is a terminal, which a capture would garble (name a file, or pipe it to tshark -r -)")]
    Terminal,
    /// It is a directory or a block device.
    #[error("is {0} (expected a file, a named pipe, or /dev/stdout)")]
    Kind(&'static str),
    /// Frames of a guest go there.
    #[error("is where the guest of {0} is (name another file)")]
    Stdio(String),
}

/// Opens it, emptied; for its owner alone where it is new. Nothing is made where a symbolic link leads, only opened. A
/// named pipe is waited for until somebody reads it, and `waiting` is called once before. `stdio` is what puts a guest on
/// standard input and output, as it was typed. Cancel safe.
///
/// # Errors
/// [`PcapError`].
pub async fn open_pcap(
    path: &Path,
    stdio: Option<&str>,
    waiting: impl FnOnce(),
) -> Result<OwnedFd, PcapError> {
    let mut waiting = Some(waiting);
    let file = loop {
        match open(path) {
            Ok(file) => break file,
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) && is_pipe(path) => {
                if let Some(waiting) = waiting.take() {
                    waiting();
                }
                tokio::time::sleep(READER_INTERVAL).await;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && path.is_symlink() => {
                return Err(PcapError::Dangling);
            }
            Err(_) if path.is_dir() => return Err(PcapError::Kind("a directory")),
            Err(error) => return Err(PcapError::Open(error)),
        }
    };
    if file.is_terminal() {
        return Err(PcapError::Terminal);
    }
    let metadata = file.metadata().map_err(PcapError::Open)?;
    let kind = metadata.file_type();
    if kind.is_block_device() {
        return Err(PcapError::Kind("a block device"));
    }
    let is_stdout = |stdout: &File| {
        stdout
            .metadata()
            .is_ok_and(|of_stdout| (of_stdout.dev(), of_stdout.ino()) == (metadata.dev(), metadata.ino()))
    };
    if let Some(stdio) = stdio
        && !kind.is_char_device()
        && stdout().is_some_and(|file| is_stdout(&file))
    {
        return Err(PcapError::Stdio(stdio.to_owned()));
    }
    if kind.is_file() {
        file.set_len(0).map_err(PcapError::Open)?;
    }
    // Its writer is a thread of its own, and may wait.
    let system = |error: nix::errno::Errno| PcapError::Open(error.into());
    let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL).map_err(system)?);
    fcntl(&file, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK)).map_err(system)?;
    Ok(file.into())
}

fn open(path: &Path) -> io::Result<File> {
    // Not following a pipe into a wait that no signal ends.
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    // Whoever can put a link there is not to choose where a file comes to be. `create` also where there is one: the
    // kernel then refuses files that others have put into a directory of everybody's.
    let made = File::options()
        .write(true)
        .create(true)
        .mode(0o600)
        .custom_flags((flags | OFlag::O_NOFOLLOW).bits())
        .open(path);
    match made {
        // A link, as /dev/stdout is one.
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
            File::options().write(true).custom_flags(flags.bits()).open(path)
        }
        made => made,
    }
}

fn is_pipe(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|metadata| metadata.file_type().is_fifo())
}

/// Standard output, to be looked at.
fn stdout() -> Option<File> {
    use std::os::fd::AsFd as _;
    Some(File::from(io::stdout().as_fd().try_clone_to_owned().ok()?))
}

/// How often a named pipe is looked at.
const READER_INTERVAL: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::PathBuf;

    use super::*;

    fn path(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("vnet-pcap{}-{name}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        path
    }

    #[tokio::test]
    async fn a_file_is_emptied_and_its_owners_alone() {
        let path = path("file");
        open_pcap(&path, None, || unreachable!()).await.unwrap();
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        std::fs::write(&path, "of the last time").unwrap();
        open_pcap(&path, Some("-listen-stdio"), || unreachable!())
            .await
            .unwrap();
        assert_eq!(path.metadata().unwrap().len(), 0);
        std::fs::remove_file(path).unwrap();
    }

    #[tokio::test]
    async fn a_link_is_followed_to_what_is_there_and_nothing_is_made_where_it_leads() {
        let [link, target] = ["link", "target"].map(path);
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let refused = open_pcap(&link, None, || unreachable!()).await.unwrap_err();
        assert_eq!(
            refused.to_string(),
            "is a link that leads to nothing, and nothing is made where a link leads (remove it, or make what it leads \
             to)"
        );
        assert!(!target.exists());
        std::fs::write(&target, "of the last time").unwrap();
        open_pcap(&link, None, || unreachable!()).await.unwrap();
        assert_eq!(target.metadata().unwrap().len(), 0);
        for path in [link, target] {
            std::fs::remove_file(path).unwrap();
        }
    }

    #[tokio::test]
    async fn a_pipe_is_waited_for_and_written_as_any_file() {
        let path = path("pipe");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_retain(0o600)).unwrap();
        let (told, waits) = tokio::sync::oneshot::channel();
        let reader = path.clone();
        let read = tokio::spawn(async move {
            waits.await.unwrap();
            tokio::task::spawn_blocking(move || {
                let mut text = String::new();
                File::open(reader).unwrap().read_to_string(&mut text).unwrap();
                text
            })
            .await
            .unwrap()
        });
        let opened = open_pcap(&path, None, || told.send(()).unwrap()).await.unwrap();
        let flags = OFlag::from_bits_retain(fcntl(&opened, FcntlArg::F_GETFL).unwrap());
        assert!(
            !flags.contains(OFlag::O_NONBLOCK),
            "its thread waits, and does not spin"
        );
        let mut file = File::from(opened);
        file.write_all(b"through the pipe").unwrap();
        drop(file);
        assert_eq!(read.await.unwrap(), "through the pipe");
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn where_a_guest_is_is_told_as_it_was_typed() {
        for typed in ["-listen-stdio", "--listen-stdio", "c.yaml:1:14: interfaces.stdio"] {
            let told = PcapError::Stdio(typed.to_owned()).to_string();
            assert_eq!(
                told,
                format!("is where the guest of {typed} is (name another file)")
            );
        }
    }

    #[tokio::test]
    async fn what_is_no_place_for_a_capture_is_told() {
        let told = async |path: &str| {
            open_pcap(Path::new(path), None, || ())
                .await
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            told("/tmp").await,
            "is a directory (expected a file, a named pipe, or /dev/stdout)"
        );
        assert_eq!(
            told("/nowhere/at/all").await,
            "cannot be opened: No such file or directory (os error 2) (make its directory, or write elsewhere)"
        );
    }
}
