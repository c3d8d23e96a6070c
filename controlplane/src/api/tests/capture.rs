//! Captures from a dataplane to a client, over real sockets: who may send, who is slow, who goes.

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming};
use v1::command::Command;

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);
const FRAME_BYTES: usize = 1_000;

/// A session with VM `web`.
struct Dataplane {
    say: mpsc::Sender<v1::SessionRequest>,
    told: Streaming<v1::SessionResponse>,
}

impl Dataplane {
    async fn attach(served: &Served) -> Self {
        let (say, mut told) = served.session(hello(1, vec![vm_up(1, "web")])).await;
        assert!(matches!(next(&mut told).await, Told::Welcome(_)));
        Self { say, told }
    }

    async fn command(&mut self) -> (u64, Command) {
        loop {
            let told = tokio::time::timeout(PATIENCE, next(&mut self.told)).await;
            if let Told::Command(command) = told.expect("a command in time") {
                return (command.command_id, command.command.unwrap());
            }
        }
    }

    /// Takes the command to begin, and gives its token.
    async fn begins(&mut self, error: Option<v1::CommandError>) -> v1::StartCapture {
        let (command_id, Command::StartCapture(start)) = self.command().await else {
            panic!("another command");
        };
        let ack = v1::Ack {
            command_id,
            error,
            ..Default::default()
        };
        self.say.send(request(Message::Ack(ack))).await.unwrap();
        start
    }
}

/// Asks for a capture as a client does; it is answered when the dataplane has begun.
async fn ask(served: &Served, request: v1::CaptureVmRequest) -> Asking {
    let mut client = VmServiceClient::new(served.channel("api").await);
    tokio::spawn(async move { client.capture_vm(request).await })
}

type Asking = tokio::task::JoinHandle<Result<Response<Streaming<v1::CaptureVmResponse>>, Status>>;
type Sending = tokio::task::JoinHandle<Result<Response<v1::SendCaptureResponse>, Status>>;

fn of_web() -> v1::CaptureVmRequest {
    v1::CaptureVmRequest {
        vm: "web".to_owned(),
        ..Default::default()
    }
}

/// Sends packets as a dataplane does.
async fn send(
    served: &Served,
    socket: &str,
    token: Vec<u8>,
) -> (mpsc::Sender<v1::SendCaptureRequest>, Sending) {
    let (messages, outgoing) = mpsc::channel(1);
    let mut client = DataplaneServiceClient::new(served.channel(socket).await);
    let sending = tokio::spawn(async move { client.send_capture(ReceiverStream::new(outgoing)).await });
    let first = v1::SendCaptureRequest {
        token,
        ..Default::default()
    };
    messages.send(first).await.unwrap();
    (messages, sending)
}

fn packets(count: usize) -> v1::SendCaptureRequest {
    let packet = v1::CapturedPacket {
        data: vec![7; FRAME_BYTES],
        original_length: FRAME_BYTES as u32,
        ..Default::default()
    };
    v1::SendCaptureRequest {
        packets: vec![packet; count],
        ..Default::default()
    }
}

async fn message(
    stream: &mut Streaming<v1::CaptureVmResponse>,
) -> Result<Option<v1::CaptureVmResponse>, Status> {
    tokio::time::timeout(PATIENCE, stream.message())
        .await
        .expect("a message in time")
}

#[tokio::test]
async fn packets_pass_until_the_client_goes_and_then_the_dataplane_is_told() {
    let served = Served::start(false).await;
    let mut dataplane = Dataplane::attach(&served).await;
    let wanted = v1::CaptureVmRequest {
        filter: "tcp port 80".to_owned(),
        snap_length: 96,
        max_packets: 5,
        ..of_web()
    };
    let asking = ask(&served, wanted).await;
    let start = dataplane.begins(None).await;
    assert_eq!((start.vm, &*start.filter), (1, "tcp port 80"));
    assert_eq!((start.snap_length, start.max_packets), (96, 5));
    let mut stream = asking.await.unwrap().unwrap().into_inner();
    let begun = message(&mut stream).await.unwrap().unwrap();
    assert_eq!(begun, v1::CaptureVmResponse::default());

    let (messages, sending) = send(&served, "session", start.token.clone()).await;
    messages.send(packets(2)).await.unwrap();
    // The first message of the dataplane has none.
    let mut seen = 0;
    while seen < 2 {
        seen += message(&mut stream).await.unwrap().unwrap().packets.len();
    }
    let (_, again) = send(&served, "session", start.token.clone()).await;
    assert_eq!(
        again.await.unwrap().unwrap_err().code(),
        Code::NotFound,
        "one stream a capture"
    );

    drop(stream);
    let (_, stop) = dataplane.command().await;
    assert_eq!(stop, Command::StopCapture(v1::StopCapture { token: start.token }));
    sending.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_client_that_does_not_read_loses_packets_and_keeps_nobody_waiting() {
    const MESSAGES: usize = 120;
    const PACKETS: usize = 200;
    let served = Served::start(false).await;
    let mut dataplane = Dataplane::attach(&served).await;
    let asking = ask(&served, of_web()).await;
    let start = dataplane.begins(None).await;
    let mut stream = asking.await.unwrap().unwrap().into_inner();
    let (messages, sending) = send(&served, "session", start.token).await;
    // 24 MB, which no queue on the way holds.
    let all = async {
        for _ in 0..MESSAGES {
            messages.send(packets(PACKETS)).await.unwrap();
        }
    };
    tokio::time::timeout(PATIENCE, all).await.expect("it reads on");
    let last = v1::SendCaptureRequest {
        dropped: 3,
        end: v1::CaptureEnd::Packets.into(),
        ..Default::default()
    };
    messages.send(last).await.unwrap();
    drop(messages);
    let (mut seen, mut dropped, mut end) = (0, 0, v1::CaptureEnd::Unspecified);
    while let Some(next) = message(&mut stream).await.unwrap() {
        seen += next.packets.len() as u64;
        dropped = next.dropped;
        end = next.end();
    }
    sending.await.unwrap().unwrap();
    assert_eq!(end, v1::CaptureEnd::Packets);
    assert_eq!(seen + dropped, (MESSAGES * PACKETS) as u64 + 3);
    assert!(dropped > 3 && seen > 0, "{seen} came, {dropped} did not");
    assert_eq!(served.rig.metrics.capture_dropped.get(), dropped - 3);
}

#[tokio::test]
async fn a_lost_dataplane_ends_the_capture_with_a_word() {
    let served = Served::start(false).await;
    let mut dataplane = Dataplane::attach(&served).await;
    let asking = ask(&served, of_web()).await;
    dataplane.begins(None).await;
    let mut stream = asking.await.unwrap().unwrap().into_inner();
    drop(dataplane);
    message(&mut stream).await.unwrap().unwrap();
    let lost = message(&mut stream).await.unwrap_err();
    assert_eq!(lost.code(), Code::Unavailable, "{lost:?}");
}

#[tokio::test]
async fn only_who_was_asked_may_send_and_only_what_is_small_enough() {
    let served = Served::start(false).await;
    let mut dataplane = Dataplane::attach(&served).await;
    let (_, sending) = send(&served, "session", vec![7; 16]).await;
    assert_eq!(sending.await.unwrap().unwrap_err().code(), Code::NotFound);
    let (_, sending) = send(&served, "api", vec![7; 16]).await;
    assert_eq!(sending.await.unwrap().unwrap_err().code(), Code::Unimplemented);

    let too_many = v1::SendCaptureRequest {
        packets: vec![v1::CapturedPacket::default(); 4_097],
        ..Default::default()
    };
    for too_much in [packets(2_000), too_many] {
        let asking = ask(&served, of_web()).await;
        let start = dataplane.begins(None).await;
        let mut stream = asking.await.unwrap().unwrap().into_inner();
        let (messages, sending) = send(&served, "session", start.token).await;
        messages.send(too_much).await.unwrap();
        assert_eq!(sending.await.unwrap().unwrap_err().code(), Code::InvalidArgument);
        let ended = loop {
            match message(&mut stream).await {
                Ok(next) => assert!(next.unwrap().packets.is_empty()),
                Err(status) => break status,
            }
        };
        assert_eq!(ended.code(), Code::Unavailable);
        drop(stream);
        assert!(matches!(dataplane.command().await.1, Command::StopCapture(_)));
    }
}

#[tokio::test]
async fn what_cannot_be_captured_is_refused() {
    let served = Served::start(false).await;
    let asking = ask(&served, of_web()).await.await.unwrap();
    assert_eq!(asking.unwrap_err().code(), Code::NotFound);
    let mut dataplane = Dataplane::attach(&served).await;
    let wrong = [
        v1::CaptureVmRequest {
            filter: "tpc".to_owned(),
            ..of_web()
        },
        v1::CaptureVmRequest {
            snap_length: 262_145,
            ..of_web()
        },
        v1::CaptureVmRequest {
            duration: Some(prost_types::Duration::default()),
            ..of_web()
        },
    ];
    for request in wrong {
        let refused = ask(&served, request).await.await.unwrap().unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
    }
    let asking = ask(&served, of_web()).await;
    let full = v1::CommandError {
        code: Code::ResourceExhausted as u32,
        text: "VM web has 4 captures already".to_owned(),
        ..Default::default()
    };
    dataplane.begins(Some(full)).await;
    let refused = asking.await.unwrap().unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    assert!(refused.message().contains("4 captures"));
}

#[tokio::test]
async fn captures_of_all_dataplanes_together_have_a_limit() {
    let served = Served::start(false).await;
    let mut dataplane = Dataplane::attach(&served).await;
    let mut open = Vec::new();
    for _ in 0..crate::hub::CAPTURES_MAX {
        let asking = ask(&served, of_web()).await;
        dataplane.begins(None).await;
        open.push(asking.await.unwrap().unwrap().into_inner());
    }
    let refused = ask(&served, of_web()).await.await.unwrap().unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    open.pop();
    assert!(matches!(dataplane.command().await.1, Command::StopCapture(_)));
    let asking = ask(&served, of_web()).await;
    dataplane.begins(None).await;
    asking.await.unwrap().unwrap();
}
