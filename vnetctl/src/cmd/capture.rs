//! `capture`: a VM's packets, live, as pcapng.

use std::fs::File;
use std::io::{self, IsTerminal as _};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tonic::{Status, Streaming};
use vnet_proto::model::CaptureFilter;
use vnet_proto::v1;

use super::Context;
use super::select::{duration, size};
use crate::failure::Failure;
use crate::launch::{
    CAPTURE_SNAP_BYTES_MAX, CAPTURE_STATISTICS_BYTES, CaptureDirection, PacketBlock, Pcapng, open_pcap,
};
use crate::output::{self, text::safe};

/// Arguments of `capture`.
#[derive(Debug, Args)]
pub struct CaptureArgs {
    /// The VM
    #[arg(value_name = "VM")]
    pub vm: String,
    /// Which packets: terms that must all hold, each perhaps behind `not`: tcp, udp, icmp, arp, ip, ip6, `port N`,
    /// `port N-M`, `host ADDRESS`, `host CIDR` [default: all]
    #[arg(long, value_name = "EXPR", default_value = "", hide_default_value = true)]
    pub filter: CaptureFilter,
    /// Bytes kept of each packet [default: 262144]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1..=i64::from(CAPTURE_SNAP_BYTES_MAX)))]
    pub snap: Option<u32>,
    /// End after so many packets
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// End after so long, as 10s or 5m
    #[arg(long = "for", value_name = "TIME", value_parser = duration)]
    pub length: Option<Duration>,
    /// End before so much is written, as 500MB or 1GiB
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub limit: Option<u64>,
    /// Where to write: a file, which is emptied, a named pipe, or - for stdout
    #[arg(short, long, value_name = "FILE")]
    pub write: PathBuf,
}

impl CaptureArgs {
    /// Runs it until it is over or interrupted.
    ///
    /// # Errors
    /// What the controlplane refuses, and where it cannot be written.
    pub async fn execute(self, context: &mut Context) -> Result<(), Failure> {
        let unavailable = |e: io::Error| Failure::Failed(format!("cannot wait for signals: {e}"));
        let mut interrupt = signal(SignalKind::interrupt()).map_err(unavailable)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(unavailable)?;
        let is_stdout = self.write.as_os_str() == "-";
        if is_stdout && io::stdout().is_terminal() {
            return Err(Failure::Usage(
                "-w -: stdout is a terminal, which a capture would garble (name a file, or pipe it to tshark -r -)"
                    .to_owned(),
            ));
        }
        let request = self.request()?;
        let client = context.connection.open().await?;
        let stream = client.vms().capture_vm(request).await?.into_inner();
        // Only now: what is refused leaves the file as it was.
        let into: Box<dyn io::Write + Send> = if is_stdout {
            Box::new(io::stdout())
        } else {
            let shown = self.write.display().to_string();
            let waiting = || output::say(safe(&format!("waiting for a reader of {shown}")));
            let opened = tokio::select! {
                _ = interrupt.recv() => return Ok(()),
                _ = terminate.recv() => return Ok(()),
                opened = open_pcap(&self.write, None, waiting) => opened,
            };
            let failed = |error| Failure::Failed(safe(&format!("{shown} {error}")).into_owned());
            Box::new(File::from(opened.map_err(failed)?))
        };
        // A thread of its own, so that a reader which keeps it waiting keeps no signal from being heard.
        let (messages, to_write) = mpsc::channel(1);
        let (done, mut written) = oneshot::channel();
        let writer = Writer::begin(into, &self);
        std::thread::spawn(move || {
            // Who waits no more for it is told nothing.
            let _ = done.send(writer.run(to_write));
        });
        let mut interrupted = false;
        let mut outcome = None;
        let ended = tokio::select! {
            _ = interrupt.recv() => { interrupted = true; Ok(v1::CaptureEnd::Stopped) }
            _ = terminate.recv() => { interrupted = true; Ok(v1::CaptureEnd::Stopped) }
            ended = forward(stream, messages) => ended,
            // Full, or its reader is gone.
            early = &mut written => { outcome = Some(early); Ok(v1::CaptureEnd::Stopped) }
        };
        let patience = async {
            if !interrupted {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
            }
            tokio::time::sleep(FINISH_PATIENCE).await;
        };
        let counts = match outcome {
            Some(outcome) => outcome,
            None => tokio::select! {
                outcome = &mut written => outcome,
                () = patience => {
                    output::say("the capture's reader takes no more, and the last of it is missing");
                    return Ok(());
                }
            },
        };
        let counts = counts.map_err(|_| Failure::Failed("the capture's writer failed".to_owned()))??;
        let why = match &ended {
            Ok(v1::CaptureEnd::VmGone) => "; the VM is gone",
            _ => "",
        };
        output::say(safe(&format!("{counts} of VM {}{why}", self.vm)));
        ended.map(drop).map_err(Failure::from)
    }

    fn request(&self) -> Result<v1::CaptureVmRequest, Failure> {
        let length = self.length.map(prost_types::Duration::try_from).transpose();
        Ok(v1::CaptureVmRequest {
            vm: self.vm.clone(),
            filter: self.filter.to_string(),
            snap_length: self.snap.unwrap_or_default(),
            max_packets: self.count.unwrap_or_default(),
            duration: length
                .map_err(|_| Failure::Usage("--for is too long (expected at most a week)".to_owned()))?,
        })
    }
}

/// Hands what comes to the writer, until it is over or the writer is.
async fn forward(
    mut stream: Streaming<v1::CaptureVmResponse>,
    messages: mpsc::Sender<v1::CaptureVmResponse>,
) -> Result<v1::CaptureEnd, Status> {
    loop {
        let Some(message) = stream.message().await? else {
            return Ok(v1::CaptureEnd::Stopped);
        };
        let end = message.end();
        if messages.send(message).await.is_err() || end != v1::CaptureEnd::Unspecified {
            return Ok(end);
        }
    }
}

/// Writes pcapng and counts.
struct Writer<W> {
    into: W,
    section: Pcapng,
    interface: u32,
    /// Bytes that may still be written, if there is a limit, but for the statistics.
    left: Option<u64>,
    packets: u64,
    dropped: u64,
}

impl<W: io::Write> Writer<W> {
    fn begin(into: W, args: &CaptureArgs) -> Self {
        let mut section = Pcapng::new();
        let snap = args.snap.unwrap_or(CAPTURE_SNAP_BYTES_MAX);
        let interface = section.interface(&args.vm, snap, &args.filter.to_string());
        Self {
            into,
            left: args
                .limit
                .map(|limit| limit.saturating_sub((section.bytes().len() + CAPTURE_STATISTICS_BYTES) as u64)),
            section,
            interface,
            packets: 0,
            dropped: 0,
        }
    }

    /// Writes what comes until there is no more of it, or no room for it. What it counted.
    fn run(mut self, mut messages: mpsc::Receiver<v1::CaptureVmResponse>) -> Result<String, Failure> {
        self.flush()?;
        let mut has_room = true;
        while has_room && let Some(message) = messages.blocking_recv() {
            has_room = self.take(&message);
            self.flush()?;
        }
        self.finish()?;
        Ok(self.counts())
    }

    /// False when there is no room for all of it.
    fn take(&mut self, message: &v1::CaptureVmResponse) -> bool {
        self.dropped = self.dropped.max(message.dropped);
        for packet in &message.packets {
            if let Some(left) = &mut self.left {
                let Some(rest) = left.checked_sub(Pcapng::packet_bytes(packet.data.len()) as u64) else {
                    return false;
                };
                *left = rest;
            }
            self.packets += 1;
            self.section.packet(&PacketBlock {
                interface: self.interface,
                at_ns: packet.time.as_ref().map_or(0, nanoseconds),
                direction: if packet.from_guest {
                    CaptureDirection::Outbound
                } else {
                    CaptureDirection::Inbound
                },
                original_length: packet.original_length,
                data: &packet.data,
            });
        }
        true
    }

    fn flush(&mut self) -> Result<(), Failure> {
        let written = self
            .into
            .write_all(self.section.bytes())
            .and_then(|()| self.into.flush());
        self.section.clear();
        written.map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::OutputClosed,
            _ => Failure::Failed(format!(
                "cannot write the capture: {error} ({} in it)",
                self.counts()
            )),
        })
    }

    /// Writes the last block, of statistics.
    fn finish(&mut self) -> Result<(), Failure> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        let wanted = self.packets.saturating_add(self.dropped);
        self.section.statistics(self.interface, now, wanted, self.dropped);
        self.flush()
    }

    fn counts(&self) -> String {
        let packets = |count| match count {
            1 => "1 packet".to_owned(),
            count => format!("{count} packets"),
        };
        format!("{} captured, {} dropped", packets(self.packets), self.dropped)
    }
}

/// Since the Unix epoch; what is before it is taken for it.
fn nanoseconds(time: &prost_types::Timestamp) -> u64 {
    let seconds = u64::try_from(time.seconds).unwrap_or_default();
    let nanos = u64::try_from(time.nanos).unwrap_or_default();
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}

/// How long a reader may take for the last of it when the capture is interrupted.
const FINISH_PATIENCE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> CaptureArgs {
        CaptureArgs {
            vm: "web".to_owned(),
            filter: "tcp port 80".parse().unwrap(),
            snap: None,
            count: None,
            length: None,
            limit: None,
            write: "-".into(),
        }
    }

    #[test]
    fn what_comes_is_written_and_counted_with_the_statistics_last() {
        let mut writer = Writer::begin(Vec::new(), &args());
        let packet = |from_guest| v1::CapturedPacket {
            time: Some(prost_types::Timestamp {
                seconds: 1,
                nanos: 500,
            }),
            data: b"frame".to_vec(),
            original_length: 9,
            from_guest,
        };
        for dropped in [0, 3] {
            let message = v1::CaptureVmResponse {
                packets: vec![packet(true), packet(false)],
                dropped,
                end: 0,
            };
            assert!(writer.take(&message));
            writer.flush().unwrap();
        }
        writer.finish().unwrap();

        let mut expected = Pcapng::new();
        expected.interface("web", CAPTURE_SNAP_BYTES_MAX, "tcp port 80");
        for direction in [CaptureDirection::Outbound, CaptureDirection::Inbound].repeat(2) {
            expected.packet(&PacketBlock {
                interface: 0,
                at_ns: 1_000_000_500,
                direction,
                original_length: 9,
                data: b"frame",
            });
        }
        assert!(writer.into.starts_with(expected.bytes()));
        let rest = &writer.into[expected.bytes().len()..];
        assert_eq!(
            (rest[0], rest[24], rest[36]),
            (5, 7, 3),
            "seven wanted, three of them lost"
        );
        assert_eq!(writer.counts(), "4 packets captured, 3 dropped");
    }

    #[test]
    fn it_has_no_more_bytes_than_it_may_and_its_statistics_nevertheless() {
        let message = v1::CaptureVmResponse {
            packets: vec![v1::CapturedPacket {
                data: vec![7; 57],
                ..Default::default()
            }],
            ..Default::default()
        };
        let begun = Writer::begin(Vec::new(), &args()).section.bytes().len();
        let packet = Pcapng::packet_bytes(57);
        let three = begun + 3 * packet + CAPTURE_STATISTICS_BYTES;
        for (limit, expected) in [(three - 1, 2), (three, 3), (three + packet - 1, 3), (0, 0)] {
            let args = CaptureArgs {
                limit: Some(limit as u64),
                ..args()
            };
            let (messages, to_write) = mpsc::channel(9);
            for _ in 0..9 {
                messages.try_send(message.clone()).unwrap();
            }
            let mut written = Vec::new();
            let counts = Writer::begin(&mut written, &args).run(to_write).unwrap();
            assert!(
                counts.starts_with(&format!("{expected} packets captured")),
                "{counts}"
            );
            assert_eq!(
                written.len(),
                begun + expected * packet + CAPTURE_STATISTICS_BYTES
            );
            assert!(messages.is_closed());
        }
    }

    #[test]
    fn a_reader_that_went_away_is_no_failure_and_a_full_disk_is() {
        struct Fails(io::ErrorKind);
        impl io::Write for Fails {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(self.0.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let flush = |kind| Writer::begin(Fails(kind), &args()).flush().unwrap_err();
        assert!(matches!(flush(io::ErrorKind::BrokenPipe), Failure::OutputClosed));
        let full = flush(io::ErrorKind::StorageFull).to_string();
        assert!(full.contains("0 packets captured, 0 dropped in it"), "{full}");
    }
}
