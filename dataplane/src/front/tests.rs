//! Both ends of the channel, over real sockets.

use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::egress::stream::HostStream;
use crate::front::channel::WAITING_MAX;
use crate::metrics::{FrontRefusal, Metrics};

const PATIENCE: Duration = Duration::from_secs(10);

fn services(read: &[u8]) -> FrontMessage {
    FrontMessage::Services {
        listen: "unix:///run/network.sock".to_owned(),
        read: read.to_vec(),
    }
}

async fn receive(receiver: &mut FrontReceiver) -> (FrontMessage, UnixStream) {
    let received = tokio::time::timeout(PATIENCE, receiver.receive()).await;
    match received.expect("a message comes").unwrap() {
        (message, HostStream::Unix(stream)) => (message, stream),
        other => panic!("{other:?}"),
    }
}

#[test]
fn messages_are_written_as_they_are_agreed_on() {
    let written = |message: &FrontMessage| serde_json::to_string(message).unwrap();
    let target = "192.168.127.2:22".parse().unwrap();
    let address = "192.168.127.2".parse().unwrap();
    assert_eq!(
        written(&FrontMessage::Tunnel { target }),
        r#"{"tunnel":{"target":"192.168.127.2:22"}}"#
    );
    assert_eq!(
        written(&services(b"GET / HTTP/1.1\r\n")),
        r#"{"services":{"listen":"unix:///run/network.sock","read":"R0VUIC8gSFRUUC8xLjENCg=="}}"#
    );
    assert_eq!(
        written(&FrontMessage::Guest { vm: 7, address }),
        r#"{"guest":{"vm":7,"address":"192.168.127.2"}}"#
    );
}

#[tokio::test]
async fn a_connection_arrives_with_its_message_in_both_directions() {
    let (one, other) = pair().unwrap();
    for end in [&one, &other] {
        let flags = nix::fcntl::fcntl(end, nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags, nix::libc::FD_CLOEXEC, "no child inherits it");
    }
    let (here, mut from_there) = open(one, Arc::default()).unwrap();
    let (there, mut from_here) = open(other, Arc::default()).unwrap();
    for (sender, receiver) in [(&here, &mut from_here), (&there, &mut from_there)] {
        let (mut kept, given) = UnixStream::pair().unwrap();
        let said = services(&[0xff; 40_000]);
        sender.send(&said, given).unwrap();
        let (message, mut stream) = receive(receiver).await;
        assert_eq!(message, said);
        let flags = nix::fcntl::fcntl(&stream, nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags, nix::libc::FD_CLOEXEC, "no child inherits it");
        kept.write_all(b"hello").unwrap();
        let mut read = [0; 5];
        stream.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"hello");
        drop(stream);
        assert_eq!(kept.read(&mut read).unwrap(), 0, "nobody else holds it");
    }
}

#[tokio::test]
async fn datagrams_that_are_no_message_are_left_out_and_their_descriptors_closed() {
    let (one, other) = pair().unwrap();
    let metrics: Arc<Metrics> = Arc::default();
    let (_sender, mut receiver) = open(one, Arc::clone(&metrics)).unwrap();
    let good = serde_json::to_vec(&services(b"GET")).unwrap();
    let too_long = vec![b' '; MESSAGE_BYTES_MAX + 1];
    let mut kept = Vec::new();
    let mut stream = || -> OwnedFd {
        let (here, there) = UnixStream::pair().unwrap();
        kept.push(here);
        there.into()
    };
    codec::send(&other, &good, &[]).unwrap();
    codec::send(&other, &good, &[&stream(), &stream()]).unwrap();
    codec::send(&other, b"", &[&stream()]).unwrap();
    codec::send(&other, b"{\"tunnel\":", &[&stream()]).unwrap();
    codec::send(
        &other,
        br#"{"tunnel":{"target":"192.168.127.2:22","to":1}}"#,
        &[&stream()],
    )
    .unwrap();
    codec::send(&other, br#"{"tunnel":{"target":"nowhere"}}"#, &[&stream()]).unwrap();
    codec::send(&other, &too_long, &[&stream()]).unwrap();
    let no_stream = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    codec::send(&other, &good, &[&no_stream]).unwrap();
    codec::send(&other, &good, &[&stream()]).unwrap();

    let (message, taken) = receive(&mut receiver).await;

    assert_eq!(message, services(b"GET"));
    assert_eq!(metrics.front_refusals.of(FrontRefusal::Malformed).get(), 8);
    let last = kept.pop().unwrap();
    for mut end in kept {
        end.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(end.read(&mut [0]).unwrap(), 0, "it was closed");
    }
    drop(taken);
    drop(last);
}

#[tokio::test]
async fn beyond_the_limit_connections_are_closed_and_counted_and_the_rest_arrives() {
    let (one, other) = pair().unwrap();
    let metrics: Arc<Metrics> = Arc::default();
    let (sender, _) = open(one, Arc::clone(&metrics)).unwrap();
    // The other side's queue in the system is full: nothing leaves until somebody reads.
    let (filler, _filler_other) = UnixStream::pair().unwrap();
    let filler = OwnedFd::from(filler);
    let good = services(b"GET");
    let mut refused = 0;
    let mut accepted = 0;
    // One turn of the writer between each, so that it takes what it can.
    for _ in 0..4_096 {
        match sender.send(&good, filler.try_clone().unwrap()) {
            Ok(()) => accepted += 1,
            Err(NotSent::Full) => {
                refused += 1;
                if refused == 3 {
                    break;
                }
            }
            Err(error) => panic!("{error}"),
        }
        tokio::task::yield_now().await;
    }
    assert_eq!(refused, 3);
    assert_eq!(metrics.front_refusals.of(FrontRefusal::Full).get(), 3);
    assert!(accepted >= WAITING_MAX, "{accepted}");

    let (_, mut receiver) = open(other, Arc::default()).unwrap();
    for _ in 0..accepted {
        let (message, _) = receive(&mut receiver).await;
        assert_eq!(message, good);
    }
}

#[tokio::test]
async fn a_message_that_is_too_long_and_an_end_that_is_gone_close_the_connection() {
    let (one, other) = pair().unwrap();
    let metrics: Arc<Metrics> = Arc::default();
    let (sender, _receiver) = open(one, Arc::clone(&metrics)).unwrap();
    let (mut kept, given) = UnixStream::pair().unwrap();
    let long = services(&[0; MESSAGE_BYTES_MAX]);
    assert_eq!(sender.send(&long, given), Err(NotSent::TooLong));
    assert_eq!(kept.read(&mut [0]).unwrap(), 0);

    drop(other);
    let (kept, given) = UnixStream::pair().unwrap();
    sender.send(&services(b"GET"), given).unwrap();
    kept.set_nonblocking(true).unwrap();
    let mut kept = tokio::net::UnixStream::from_std(kept).unwrap();
    let end = tokio::time::timeout(PATIENCE, tokio::io::AsyncReadExt::read(&mut kept, &mut [0])).await;
    assert_eq!(end.expect("it is closed").unwrap(), 0);
    assert_eq!(metrics.front_refusals.of(FrontRefusal::Send).get(), 1);
}

#[tokio::test]
async fn a_descriptor_that_is_no_channel_is_refused() {
    let (stream, _other) = UnixStream::pair().unwrap();
    let error = open(stream.into(), Arc::default()).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
}
