use std::os::unix::net::{UnixListener, UnixStream as StdStream};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};

use nix::sched::{CloneFlags, unshare};

use super::*;
use crate::testing::TempDir;

const PATH: &str = "VNET_TEST_PEER_SOCKET";

/// The part of a peer process: connects, and stays until it is hung up on.
#[test]
#[ignore = "the other side of the tests below"]
fn the_other_side() {
    let Some(path) = std::env::var_os(PATH) else {
        return;
    };
    let mut stream = StdStream::connect(path).unwrap();
    let _ = std::io::copy(&mut stream, &mut std::io::sink());
}

/// A peer process that connects, in namespaces of its own if `flags` says so. `None`: this user may make
/// none.
fn peer(path: &std::path::Path, flags: CloneFlags) -> Option<Child> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "peer::linux::tests::the_other_side", "--ignored"])
        .env(PATH, path)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    // SAFETY: unshare(2) is a system call and nothing else, so it may stand between fork and exec.
    unsafe { command.pre_exec(move || Ok(unshare(flags)?)) };
    match command.spawn() {
        Ok(child) => Some(child),
        Err(e) if flags.is_empty() => panic!("{e}"),
        Err(e) => {
            eprintln!("skipped: this user may not make namespaces: {e}");
            None
        }
    }
}

struct Met {
    stream: UnixStream,
    child: Child,
}

impl Met {
    fn with(flags: CloneFlags) -> Option<Self> {
        let dir = TempDir::new();
        let path = dir.path().join("peer.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let child = peer(&path, flags)?;
        let (stream, _) = listener.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        Some(Self {
            stream: UnixStream::from_std(stream).unwrap(),
            child,
        })
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    fn end(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Met {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn a_peer_in_this_network_namespace_is_here_by_connection_and_by_process() {
    let mut met = Met::with(CloneFlags::empty()).unwrap();
    assert_eq!(by_connection(&met.stream).unwrap(), Place::Here);
    assert_eq!(by_process(&met.stream, met.pid()).unwrap().place, Place::Here);
    assert!(check_namespace(&met.stream, Some(met.pid()), true).is_ok());

    // Its number may be another's from now on.
    met.end();
    assert!(by_process(&met.stream, met.pid()).is_err());
    assert_eq!(by_connection(&met.stream).unwrap(), Place::Here, "that stays");
}

#[tokio::test]
async fn a_peer_in_another_network_namespace_is_refused_by_each() {
    let flags = CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET;
    let Some(mut met) = Met::with(flags) else { return };
    assert_eq!(by_connection(&met.stream).unwrap(), Place::Elsewhere);
    assert_eq!(
        by_process(&met.stream, met.pid()).unwrap().place,
        Place::Elsewhere
    );
    for same_user in [true, false] {
        assert!(matches!(
            check_namespace(&met.stream, Some(met.pid()), same_user),
            Err(PeerError::OtherNamespace { .. })
        ));
    }
    // Not even when somebody in this namespace has its number by now, this process for instance.
    let own = i32::try_from(std::process::id()).unwrap();
    assert!(matches!(
        check_namespace(&met.stream, Some(own), true),
        Err(PeerError::OtherNamespace { .. })
    ));
    met.end();
    assert_eq!(by_connection(&met.stream).unwrap(), Place::Elsewhere);
}

#[test]
fn what_cannot_be_told_is_refused() {
    let no = || Err(io::ErrorKind::PermissionDenied.into());
    let process = |place, held| Ok(Process { place, held });
    let judged = |same_user, connection, process| judge(7, same_user, connection, process);
    // Nothing tells, or only a number that may be another's.
    assert!(matches!(
        judged(true, no(), Err(io::ErrorKind::NotFound.into())),
        Err(PeerError::Namespace { .. })
    ));
    assert!(matches!(
        judged(true, no(), process(Place::Here, false)),
        Err(PeerError::Unsure { pid: 7, .. })
    ));
    // A held number does, and the connection does for root, but not for one of this user who hides.
    assert!(judged(true, no(), process(Place::Here, true)).is_ok());
    assert!(
        judged(
            false,
            Ok(Place::Here),
            Err(io::ErrorKind::PermissionDenied.into())
        )
        .is_ok()
    );
    assert!(matches!(
        judged(true, Ok(Place::Here), Err(io::ErrorKind::PermissionDenied.into())),
        Err(PeerError::Namespace { .. })
    ));
    // Where they differ, no is the answer.
    assert!(judged(false, Ok(Place::Here), process(Place::Elsewhere, false)).is_err());
    assert!(judged(false, Ok(Place::Elsewhere), process(Place::Here, true)).is_err());
}

#[test]
fn answers_of_the_kernel_are_read() {
    let mut answer = [0_u8; 64];
    assert!(read_answer(&answer).is_err());
    assert!(read_answer(&[]).is_err());
    answer[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
    answer[16..20].copy_from_slice(&(-nix::libc::ENOENT).to_ne_bytes());
    assert_eq!(read_answer(&answer).unwrap(), Place::Elsewhere);
    // Another socket has the number.
    answer[16..20].copy_from_slice(&(-nix::libc::ESTALE).to_ne_bytes());
    assert!(read_answer(&answer).is_err());
    assert!(read_answer(&answer[..18]).is_err());
}

/// Without unix_diag the kernel answers of every socket that there is none such.
#[test]
fn a_kernel_that_knows_no_socket_at_all_says_nothing_of_a_peer() {
    assert_eq!(known_apart(Place::Here).unwrap(), Place::Elsewhere);
    let nothing = known_apart(Place::Elsewhere);
    assert_eq!(nothing.as_ref().unwrap_err().kind(), io::ErrorKind::Unsupported);
    // Its process tells, where its number is held.
    let here = |held| {
        Ok(Process {
            place: Place::Here,
            held,
        })
    };
    assert!(judge(7, true, known_apart(Place::Elsewhere), here(true)).is_ok());
    assert!(matches!(
        judge(7, true, nothing, here(false)),
        Err(PeerError::Unsure { pid: 7, .. })
    ));
    let (own, _other) = StdStream::pair().unwrap();
    assert_eq!(ask(&own).unwrap(), Place::Here);
}

#[test]
fn releases_and_maps_are_read() {
    assert_eq!(version("6.1.0-18-amd64"), Some((6, 1)));
    assert_eq!(version("5.15+"), Some((5, 15)));
    assert_eq!(version("rolling"), None);
    assert!(knows_every_user("         0          0 4294967295\n"));
    assert!(!knows_every_user("0 1000 1\n") && !knows_every_user(""));
}
