//! The file of `--pcap-fd`: all guests of a network, written by a thread of its own.
//!
//! What is captured is written as soon as it comes, so that who follows the file sees it, and a dataplane that is
//! killed leaves what there was. A file that takes no more (a full disk, a pipe that nobody reads any more) ends the
//! capture with a warning, and nothing else, as does one that is as large as it may be; one that takes it slowly costs
//! frames of the capture alone.

use std::fs::File;
use std::io::{self, Write as _};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use tokio::sync::oneshot;

use crate::capture::pcapng::{Pcapng, STATISTICS_BYTES};
use crate::capture::tap::now_ns;
use crate::capture::{Capture, CaptureEnd, CaptureSpec, Packet};

/// How long the writer sleeps at most.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How much is written at once, bytes.
const WRITE_BYTES: usize = 64 << 10;
/// How long the last of it may take to be written when the dataplane ends.
const FINISH_PATIENCE: Duration = Duration::from_millis(500);

/// A capture that is written to a file.
#[derive(Debug)]
pub struct CaptureFile {
    capture: Arc<Capture>,
    done: oneshot::Receiver<()>,
}

impl CaptureFile {
    /// Writes the file from now on, at most so many bytes if it says so.
    ///
    /// # Errors
    /// The system's: no thread.
    pub fn start(file: File, bytes_max: Option<u64>) -> io::Result<Self> {
        let (waker, woken) = sync_channel(1);
        let wake = move || {
            // Full: it is told already.
            let _ = waker.try_send(());
        };
        let capture = Capture::new(CaptureSpec::default(), Box::new(wake));
        let (finished, done) = oneshot::channel();
        let captured = Arc::clone(&capture);
        thread::Builder::new().name("capture".to_owned()).spawn(move || {
            // Else a limit of the shell's on files would end the process, rather than fail a write. Where it cannot be
            // blocked it is as it was.
            let _ = SigSet::from(Signal::SIGXFSZ).thread_block();
            let mut writer = Writer::new(file, bytes_max);
            if let Err(error) = writer.run(&captured, &woken) {
                tracing::warn!(
                    %error,
                    packets = writer.packets,
                    "the capture has ended, as its file takes no more; the network goes on without it"
                );
            }
            captured.stop(CaptureEnd::Stopped);
            while captured.take().is_some() {}
            // Nobody may be there to hear it.
            let _ = finished.send(());
        })?;
        Ok(Self { capture, done })
    }

    /// What guests are captured with.
    pub fn capture(&self) -> &Arc<Capture> {
        &self.capture
    }

    /// Ends the capture and waits, for a while, until all of it is written.
    pub async fn finish(self) {
        self.capture.stop(CaptureEnd::Stopped);
        if tokio::time::timeout(FINISH_PATIENCE, self.done).await.is_err() {
            tracing::warn!("the capture's file is too slow; the last of it is missing");
        }
    }
}

struct Writer {
    file: File,
    /// Bytes of whole blocks that are in it.
    written: u64,
    bytes_max: Option<u64>,
    /// What was written can be taken back.
    is_regular: bool,
    section: Pcapng,
    packets: u64,
}

impl Writer {
    fn new(file: File, bytes_max: Option<u64>) -> Self {
        let is_regular = file.metadata().is_ok_and(|metadata| metadata.is_file());
        Self {
            file,
            written: 0,
            bytes_max,
            is_regular,
            section: Pcapng::new(),
            packets: 0,
        }
    }

    /// Writes until the capture is over.
    fn run(&mut self, capture: &Capture, woken: &Receiver<()>) -> io::Result<()> {
        self.write()?;
        loop {
            let is_over = capture.end().is_some();
            while let Some(packet) = capture.take() {
                self.describe(capture);
                if !self.has_room(&packet) {
                    tracing::warn!(
                        packets = self.packets,
                        bytes = self.bytes_max,
                        "the capture has ended, as its file is as large as it may be; the network goes on without it"
                    );
                    capture.stop(CaptureEnd::Stopped);
                    return self.finish(capture);
                }
                self.section.packet(&packet.block());
                self.packets += 1;
                if self.section.bytes().len() >= WRITE_BYTES {
                    self.write()?;
                }
            }
            self.write()?;
            if is_over {
                return self.finish(capture);
            }
            if capture.may_sleep() {
                match woken.recv_timeout(LOOK_INTERVAL) {
                    Ok(()) | Err(RecvTimeoutError::Timeout) => {}
                    // The capture, which is held here, holds the other end.
                    Err(RecvTimeoutError::Disconnected) => return Ok(()),
                }
            }
        }
    }

    /// Whether there is room for a packet, and for the statistics behind it.
    fn has_room(&self, packet: &Packet) -> bool {
        let statistics = self.section.interfaces() as usize * STATISTICS_BYTES;
        let waiting = self.section.bytes().len() + Pcapng::packet_bytes(packet.data.len()) + statistics;
        self.bytes_max
            .is_none_or(|max| self.written + waiting as u64 <= max)
    }

    /// Describes interfaces that are new, in the order of their numbers.
    fn describe(&mut self, capture: &Capture) {
        for interface in capture.interfaces_from(self.section.interfaces()) {
            self.section.interface(&interface.name, capture.snap_bytes(), "");
        }
    }

    fn finish(&mut self, capture: &Capture) -> io::Result<()> {
        self.describe(capture);
        let now = now_ns();
        for interface in capture.interfaces_from(0) {
            let (received, dropped) = interface.counts();
            self.section.statistics(interface.number, now, received, dropped);
        }
        self.write()
    }

    fn write(&mut self) -> io::Result<()> {
        let bytes = self.section.bytes();
        if let Err(error) = self.file.write_all(bytes) {
            if self.is_regular {
                // Half a block would be told as damage by whoever reads it. What cannot be cut stays as it is.
                let _ = self.file.set_len(self.written);
            }
            return Err(error);
        }
        self.written += bytes.len() as u64;
        self.section.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::time::Instant;

    use super::*;
    use crate::capture::QUEUED_FRAMES_MAX;
    use crate::capture::tap::Taps;
    use crate::engine::transmit::Transmit;
    use crate::mac::Mac;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn taps(file: &CaptureFile, name: &str) -> Taps {
        let mut taps = Taps::default();
        let mut queue = Transmit::new(Mac::BROADCAST);
        assert!(taps.add(file.capture().tap(name).unwrap(), &mut queue));
        taps
    }

    fn until(what: &str, mut is_so: impl FnMut() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !is_so() {
            assert!(Instant::now() < end, "{what}");
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Types and bodies of the blocks, as far as they are whole.
    fn blocks(mut bytes: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let word = |bytes: &[u8]| u32::from_le_bytes(bytes[..4].try_into().unwrap());
        let mut blocks = Vec::new();
        while !bytes.is_empty() {
            let length = word(&bytes[4..]) as usize;
            assert_eq!(word(&bytes[length - 4..]) as usize, length);
            blocks.push((word(bytes), bytes[8..length - 4].to_vec()));
            bytes = &bytes[length..];
        }
        blocks
    }

    #[tokio::test]
    async fn the_file_is_whole_while_it_grows_and_ends_with_counts() {
        let path = std::env::temp_dir().join(format!("vnet-capture{}-whole", std::process::id()));
        let file = CaptureFile::start(File::create(&path).unwrap(), None).unwrap();
        let (web, db) = (taps(&file, "web"), taps(&file, "db"));
        web.show_sent(1, b"a frame of web");
        db.show_sent(2, b"a frame of db");
        until("both are in the file at once", || {
            blocks(&std::fs::read(&path).unwrap())
                .iter()
                .filter(|b| b.0 == 6)
                .count()
                == 2
        });
        web.show_sent(3, b"the last");
        file.finish().await;

        let blocks = blocks(&std::fs::read(&path).unwrap());
        let kinds: Vec<u32> = blocks.iter().map(|block| block.0).collect();
        assert_eq!(kinds.iter().filter(|k| **k == 6).count(), 3);
        assert_eq!(kinds.iter().filter(|k| **k == 1).count(), 2);
        assert_eq!(kinds[kinds.len() - 2..], [5, 5], "{kinds:?}");
        // Interface 0 (web): two frames wanted, none lost.
        let of_web = &blocks[kinds.len() - 2].1;
        assert_eq!((of_web[16], of_web[28]), (2, 0));
        std::fs::remove_file(path).unwrap();
    }

    #[tokio::test]
    async fn a_reader_that_hangs_costs_frames_and_one_that_goes_ends_the_capture() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let file = CaptureFile::start(File::from(std::os::fd::OwnedFd::from(writer)), None).unwrap();
        let web = taps(&file, "web");
        // Nobody reads: the pipe and then the queue fill up, and nobody waits.
        let mut dropped = 0;
        let frame = [7; 1_500];
        for _ in 0..2 * QUEUED_FRAMES_MAX {
            dropped += web.show_sent(1, &frame);
        }
        assert!(dropped > 0);
        assert_eq!(file.capture().interfaces_from(0)[0].counts().1, dropped);
        let mut read = vec![0; 100_000];
        reader.read_exact(&mut read).unwrap();
        drop(reader);
        until("it ends", || file.capture().end().is_some());
        assert_eq!(web.show_sent(1, &frame), 0, "it is not counted as lost any more");
        let begun = Instant::now();
        file.finish().await;
        assert!(begun.elapsed() < PATIENCE);
    }

    #[tokio::test]
    async fn a_file_is_no_larger_than_it_may_be_and_ends_with_whole_blocks_and_counts() {
        let path = std::env::temp_dir().join(format!("vnet-capture{}-limit", std::process::id()));
        for bytes_max in 4_000..4_064 {
            let file = CaptureFile::start(File::create(&path).unwrap(), Some(bytes_max)).unwrap();
            let (web, _db) = (taps(&file, "web"), taps(&file, "db"));
            let frames = bytes_max as usize / 100;
            for _ in 0..frames {
                web.show_sent(1, &[7; 100]);
            }
            until("it ends", || file.capture().end().is_some());
            file.finish().await;

            let bytes = std::fs::read(&path).unwrap();
            let length = bytes.len() as u64;
            // No packet more would have been in it.
            assert!(
                length <= bytes_max && length + 144 > bytes_max,
                "{length} of {bytes_max}"
            );
            let kinds: Vec<u32> = blocks(&bytes).iter().map(|block| block.0).collect();
            assert_eq!(kinds[kinds.len() - 2..], [5, 5], "{kinds:?}");
        }
        std::fs::remove_file(path).unwrap();
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_full_disk_ends_the_capture_alone() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let file = CaptureFile::start(full, None).unwrap();
        until("it ends", || file.capture().end().is_some());
        file.finish().await;
    }
}
