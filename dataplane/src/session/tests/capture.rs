//! Captures beside a session, over a real Unix socket, against a controlplane that the test plays.

use tokio::sync::oneshot;
use tonic::{Status, Streaming};

use v1::session_request::Message;

use super::stream::{Captured, Dataplane, Fake, Stream, start};
use super::*;
use crate::capture::pcapng::SNAP_BYTES_DEFAULT;
use crate::capture::{CaptureEnd, Taps};
use crate::engine::transmit::Transmit;
use crate::mac::Mac;
use crate::session::Controlplane;

/// A dataplane in a session.
async fn welcomed() -> (Fake, Dataplane, Stream) {
    let mut controlplane = Fake::listen(Fake::path());
    let dataplane = start(Controlplane::Unix(controlplane.path.clone()));
    let mut stream = controlplane.accept().await;
    stream.hello().await;
    stream.welcome(epoch(1)).await;
    (controlplane, dataplane, stream)
}

fn asked(token: u8) -> v1::StartCapture {
    v1::StartCapture {
        token: vec![token; 16],
        vm: 1,
        ..Default::default()
    }
}

/// Sends a command, and gives its acknowledgement.
async fn command(stream: &mut Stream, command: v1::command::Command) -> v1::Ack {
    stream
        .say(response(Response::Command(v1::Command {
            command_id: 7,
            command: Some(command),
        })))
        .await;
    loop {
        match stream.next().await {
            Some(Message::Ack(ack)) => return ack,
            Some(Message::Heartbeat(_)) => {}
            other => panic!("{other:?}"),
        }
    }
}

async fn begin(stream: &mut Stream, asked: v1::StartCapture) -> Option<v1::CommandError> {
    command(stream, v1::command::Command::StartCapture(asked))
        .await
        .error
}

async fn message(requests: &mut Streaming<v1::SendCaptureRequest>) -> v1::SendCaptureRequest {
    let next = tokio::time::timeout(PATIENCE, requests.message()).await;
    next.expect("a message in time").unwrap().unwrap()
}

/// The guest's driver, as far as captures see it.
fn taps(dataplane: &Dataplane, place: usize) -> Taps {
    let mut taps = Taps::default();
    let tap = dataplane.captures.all()[place].tap("vm1").unwrap();
    assert!(taps.add(tap, &mut Transmit::new(Mac::BROADCAST)));
    taps
}

async fn stopped(dataplane: &Dataplane, place: usize) -> CaptureEnd {
    for _ in 0..5_000 {
        if let Some(end) = dataplane.captures.all()[place].end() {
            return end;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    panic!("the capture goes on");
}

#[tokio::test]
async fn packets_are_sent_beside_the_session_until_they_are_not_wanted() {
    let (mut controlplane, dataplane, mut stream) = welcomed().await;
    let wanted = v1::StartCapture {
        filter: "not arp".to_owned(),
        snap_length: 20,
        ..asked(1)
    };
    assert_eq!(begin(&mut stream, wanted).await, None);
    let Captured { mut requests, answer } = controlplane.capture().await;
    assert_eq!(
        message(&mut requests).await.token,
        [1; 16],
        "at once, without packets"
    );
    let taps = taps(&dataplane, 0);
    taps.show_sent(3_000_000_007, &[5; 60]);

    let packets = message(&mut requests).await.packets;
    assert_eq!((packets.len(), &packets[0].data[..]), (1, &[5; 20][..]));
    assert_eq!((packets[0].original_length, packets[0].from_guest), (60, true));
    let time = packets[0].time.unwrap();
    assert_eq!((time.seconds, time.nanos), (3, 7));

    let stop = v1::StopCapture { token: vec![1; 16] };
    let ack = command(&mut stream, v1::command::Command::StopCapture(stop.clone())).await;
    assert_eq!(ack.error, None);
    assert_eq!(message(&mut requests).await.end(), v1::CaptureEnd::Stopped);
    assert!(requests.message().await.unwrap().is_none(), "that was the last");
    answer.send(()).unwrap();
    let again = command(&mut stream, v1::command::Command::StopCapture(stop)).await;
    assert_eq!(again.error, None, "one that is over is no error");
}

#[tokio::test]
async fn a_controlplane_that_answers_or_is_gone_ends_what_it_asked_for() {
    let (mut controlplane, dataplane, mut stream) = welcomed().await;
    for token in [1, 2] {
        assert_eq!(begin(&mut stream, asked(token)).await, None);
    }
    let (first, second) = (controlplane.capture().await, controlplane.capture().await);
    let answered = |captured: Captured| async move {
        let mut captured = captured;
        let token = message(&mut captured.requests).await.token[0];
        (token, captured)
    };
    let (one, first) = answered(first).await;
    first.answer.send(()).unwrap();
    assert_eq!(
        stopped(&dataplane, usize::from(one) - 1).await,
        CaptureEnd::Stopped
    );
    let (other, second) = answered(second).await;
    let place = usize::from(other) - 1;
    assert_eq!(dataplane.captures.all()[place].end(), None);
    stream
        .responses
        .send(Err(Status::unavailable("going down")))
        .await
        .unwrap();
    assert_eq!(stopped(&dataplane, place).await, CaptureEnd::Stopped);
    drop(second);
}

#[tokio::test]
async fn it_ends_by_itself_with_its_limits_and_with_its_guest() {
    let (mut controlplane, dataplane, mut stream) = welcomed().await;
    let limited = v1::StartCapture {
        max_packets: 2,
        ..asked(1)
    };
    let short = v1::StartCapture {
        duration: prost_types::Duration::try_from(Duration::from_millis(50)).ok(),
        ..asked(2)
    };
    let ends = [
        (limited, v1::CaptureEnd::Packets, 2),
        // Nobody shows it anything: whether that is before its time is over is nobody's to say.
        (short, v1::CaptureEnd::Duration, 0),
        (asked(3), v1::CaptureEnd::VmGone, 3),
    ];
    for (place, (asked, expected, packets)) in ends.into_iter().enumerate() {
        assert_eq!(begin(&mut stream, asked).await, None);
        let mut captured = controlplane.capture().await;
        let taps = (expected != v1::CaptureEnd::Duration).then(|| taps(&dataplane, place));
        for _ in 0..3 {
            taps.iter().for_each(|taps| {
                taps.show_sent(1, &[2; 60]);
            });
        }
        if expected == v1::CaptureEnd::VmGone {
            drop(taps);
        }
        let (mut seen, mut end) = (0, v1::CaptureEnd::Unspecified);
        while end == v1::CaptureEnd::Unspecified {
            let next = message(&mut captured.requests).await;
            seen += next.packets.len();
            end = next.end();
        }
        assert_eq!((end, seen), (expected, packets), "{expected:?}");
    }
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_and_nothing_begins() {
    let (_controlplane, dataplane, mut stream) = welcomed().await;
    let wrong = [
        (
            v1::StartCapture {
                token: vec![1; 3],
                ..asked(1)
            },
            "token is 3 bytes long",
        ),
        (
            v1::StartCapture {
                filter: "prot tcp".to_owned(),
                ..asked(1)
            },
            "filter: \"prot\"",
        ),
        (v1::StartCapture { vm: 9, ..asked(1) }, "no guest"),
    ];
    for (asked, expected) in wrong {
        let error = begin(&mut stream, asked).await.unwrap();
        assert!(error.text.contains(expected), "{error:?}");
    }
    assert!(dataplane.captures.all().is_empty());
    let much = v1::StartCapture {
        snap_length: u32::MAX,
        ..asked(1)
    };
    assert_eq!(begin(&mut stream, much).await, None);
    assert_eq!(dataplane.captures.all()[0].snap_bytes(), SNAP_BYTES_DEFAULT);
    let twice = begin(&mut stream, asked(1)).await.unwrap();
    assert!(twice.text.contains("another capture's"), "{twice:?}");
}

/// What ends the stream of a capture when it is sent.
pub(super) type Answer = oneshot::Sender<()>;
