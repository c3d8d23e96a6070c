//! `capture`: a VM's packets, live, as pcapng.

use std::fs::File;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use vnet_proto::model::CaptureFilter;
use vnet_proto::v1;

use super::Context;
use super::select::duration;
use crate::failure::Failure;
use crate::launch::{CAPTURE_SNAP_BYTES_MAX, CaptureDirection, PacketBlock, Pcapng, open_pcap};
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
        let mut stream = client.vms().capture_vm(request).await?.into_inner();
        // Only now: what is refused leaves the file as it was.
        let into: Box<dyn io::Write + Send> = if is_stdout {
            Box::new(io::stdout())
        } else {
            let shown = self.write.display().to_string();
            let waiting = || output::say(safe(&format!("waiting for a reader of {shown}")));
            let opened = tokio::select! {
                _ = interrupt.recv() => return Ok(()),
                _ = terminate.recv() => return Ok(()),
                opened = open_pcap(&self.write, false, waiting) => opened,
            };
            let failed = |error| Failure::Failed(safe(&format!("{shown} {error}")).into_owned());
            Box::new(File::from(opened.map_err(failed)?))
        };
        let mut writer = Writer::begin(into, &self);
        writer.flush()?;
        let ended = loop {
            let message = tokio::select! {
                _ = interrupt.recv() => break Ok(v1::CaptureEnd::Stopped),
                _ = terminate.recv() => break Ok(v1::CaptureEnd::Stopped),
                message = stream.message() => message,
            };
            match message {
                Ok(Some(message)) => {
                    let end = message.end();
                    writer.take(&message);
                    writer.flush()?;
                    if end != v1::CaptureEnd::Unspecified {
                        break Ok(end);
                    }
                }
                Ok(None) => break Ok(v1::CaptureEnd::Stopped),
                Err(status) => break Err(status),
            }
        };
        writer.finish()?;
        let why = match &ended {
            Ok(v1::CaptureEnd::VmGone) => "; the VM is gone",
            _ => "",
        };
        output::say(safe(&format!("{} of VM {}{why}", writer.counts(), self.vm)));
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

/// Writes pcapng and counts.
struct Writer<W> {
    into: W,
    section: Pcapng,
    interface: u32,
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
            section,
            interface,
            packets: 0,
            dropped: 0,
        }
    }

    fn take(&mut self, message: &v1::CaptureVmResponse) {
        for packet in &message.packets {
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
        self.packets += message.packets.len() as u64;
        self.dropped = self.dropped.max(message.dropped);
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
            writer.take(&v1::CaptureVmResponse {
                packets: vec![packet(true), packet(false)],
                dropped,
                end: 0,
            });
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
