//! The program behind `scripts/power-cut`: the guest's first process, and outside it what makes and judges states.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use power_cut::cut::{Cut, States, cuts};
use power_cut::judge::{Case, WORKERS, judge};
use power_cut::write_log::WriteLog;
use power_cut::{Doing, Result, guest, initramfs};

const USAGE: &str = "usage: power-cut initramfs TARGET NAME=FILE...
       power-cut judge FOLDER FS SEED STEPS ROUNDS CUTS PASSTHROUGH COWDISK [keep]
       (see scripts/power-cut, which calls both)";

fn main() -> ExitCode {
    if std::process::id() == 1 {
        if let Err(what) = guest::run() {
            guest::say(&format!("power-cut: guest failed: {what}"));
        }
        let _ = guest::stop();
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["initramfs", target, ref files @ ..] => make_initramfs(target, files).map(|()| true),
        ["judge", folder, fs, seed, steps, rounds, count, passthrough, cowdisk, ref keep @ ..] => {
            let case = || -> Result<_> {
                Ok(Case {
                    fs: fs.to_owned(),
                    seed: seed.parse().doing("SEED")?,
                    steps: steps.parse().doing("STEPS")?,
                    rounds: rounds.parse().doing("ROUNDS")?,
                    passthrough: passthrough == "yes",
                    cowdisk: PathBuf::from(cowdisk),
                    work: PathBuf::from(folder),
                })
            };
            case().and_then(|case| {
                judge_all(&case, Path::new(folder), count.parse().doing("CUTS")?, !keep.is_empty())
            })
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(what) => {
            eprintln!("power-cut: {what}");
            ExitCode::from(3)
        }
    }
}

fn make_initramfs(target: &str, files: &[&str]) -> Result<()> {
    let pairs = files.iter().map(|pair| pair.split_once('=').ok_or(USAGE.to_owned()));
    let files: Result<Vec<_>> =
        pairs.map(|pair| pair.map(|(name, file)| (name.to_owned(), file.into()))).collect();
    let mut target = std::io::BufWriter::new(std::fs::File::create(target).doing(target)?);
    initramfs::write(&mut target, &files?)?;
    std::io::Write::flush(&mut target).doing("write the archive")
}

/// Judges cuts of the recording in `folder` (`log`, and `first.raw`, the disk before it); whether all were right.
fn judge_all(case: &Case, folder: &Path, count: usize, keep: bool) -> Result<bool> {
    let log = WriteLog::open(&folder.join("log"))?;
    let mut states = States::new(&log, folder.join("first.raw"));
    let flushes = log.entries.iter().filter(|entry| entry.kind == power_cut::write_log::Kind::Flush).count();
    let all = log.promises(case.seed, WORKERS, log.entries.len())?;
    println!("{} entries with {flushes} flushes; promised steps by the end: {all:?}", log.entries.len());
    let (mut right, mut wrong) = ([0; 3], [0; 3]);
    for (number, cut) in cuts(case.seed, log.entries.len(), count).iter().enumerate() {
        let image = folder.join(format!("cut-{number}.raw"));
        states.make(cut, &image)?;
        let promised = log.promises(case.seed, WORKERS, cut.entries)?;
        let found = judge(case, &image, cut, &promised).unwrap_or_else(|what| vec![what]);
        let kind = cut.loss as usize;
        if found.is_empty() {
            right[kind] += 1;
        } else {
            wrong[kind] += 1;
            report(number, cut, &promised, &found);
        }
        if found.is_empty() || !keep {
            std::fs::remove_file(&image).doing("remove an image")?;
        }
    }
    let of = |kind: usize| format!("{} of {}", right[kind], right[kind] + wrong[kind]);
    println!("right: linear {}, subset {}, torn {}", of(0), of(1), of(2));
    Ok(wrong == [0; 3])
}

fn report(number: usize, cut: &Cut, promised: &[usize], found: &[String]) {
    println!("cut {number} after entry {}, {:?}, with promises {promised:?}:", cut.entries, cut.loss);
    for what in found {
        println!("    {}", what.trim_end().replace('\n', "\n    "));
    }
}
